"""The TensorRT plugin under a fake CUDA driver: it passes the arguments that launch.py lists, and names each fault."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_host.plugin_driver import (
    CONV,
    LETTERS,
    SCAN,
    SCAN_FIELDS,
    case,
    expected,
    layout,
    sizes_of,
    tensors,
    workspace_start,
)
from roofline import PUBLISHED

from h1export.errors import H1ExportError
from h1export.plugins import h1
from h1export.plugins.causal_conv import launch as conv
from h1export.plugins.gpu.cubin import ARCHITECTURES, Cubin
from h1export.plugins.ssm_scan import launch as scan
from h1export.targets.tensorrt.plugin import build, library, write
from h1export.targets.tensorrt.plugin.embed import digest, write_sources
from h1export.targets.tensorrt.plugin.schema import OPS, Op, header

Harness = Callable[..., list[list[str]]]


def default(op: Op = SCAN, tokens: int = 1, fields: Mapping[str, str] | None = None, **more: Any) -> str:
    """Return a valid case of the 0.5B shape, with changes."""
    fields = (SCAN_FIELDS if op is SCAN else {"state_in_place": "i 0"}) if fields is None else fields
    return case(op, tensors(op, sizes_of(PUBLISHED[1], 2, tokens), "fp16"), fields, **more)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_scan_packs_what_launch_says(in_place: bool, harness: Harness) -> None:
    """All published shapes, dtypes and architectures run with one token and ragged chunks, after serialisation."""
    cases = []
    wanted = []
    for i, shape in enumerate(PUBLISHED):
        for dtype in LETTERS:
            for tokens in (1, 2, 300):
                gpu = ARCHITECTURES[(i + tokens) % len(ARCHITECTURES)]
                problem = scan.Problem(
                    2,
                    tokens,
                    shape.heads,
                    groups=shape.groups,
                    d_head=shape.d_head,
                    d_state=shape.d_state,
                    dtype=dtype,
                    dt_min=0.001,
                    dt_max=math.inf,
                )
                parts, size = layout(problem, workspace_start(SCAN))
                fields = SCAN_FIELDS | {"state_in_place": f"i {int(in_place)}"}
                cases.append(
                    case(
                        SCAN, tensors(SCAN, sizes_of(shape, 2, tokens), dtype), fields, gpu=gpu, in_place=int(in_place)
                    )
                )
                built = f"built {SCAN.inputs.index('state') if in_place else -1} 0 {SCAN.inputs.index('state')} {size}"
                wanted.append(
                    [built, *expected(SCAN, scan.launches(problem), gpu, in_place=in_place, parts=parts), "enqueued 0"]
                )
    assert harness(cases) == wanted


@pytest.mark.parametrize("in_place", [False, True])
def test_the_convolution_packs_what_launch_says(in_place: bool, harness: Harness) -> None:
    cases = []
    wanted = []
    for shape in PUBLISHED:
        for dtype in LETTERS:
            for tokens in (1, 2, 300):
                launch = conv.launch(
                    conv.kernel(dtype, shape.taps, True, one_token=tokens == 1), 2, tokens, channels=shape.channels
                )
                fields = {"state_in_place": f"i {int(in_place)}"}
                cases.append(
                    case(CONV, tensors(CONV, sizes_of(shape, 2, tokens), dtype), fields, gpu=90, in_place=int(in_place))
                )
                wanted.append(
                    [
                        f"built {1 if in_place else -1} 0 1 0",
                        *expected(CONV, (launch,), 90, in_place=in_place, parts={}),
                        "enqueued 0",
                    ]
                )
    assert harness(cases) == wanted


@pytest.mark.parametrize(("gpu", "taken"), [(80, 80), (86, 86), (87, 86), (89, 89), (90, 90), (121, 121)])
def test_a_gpu_takes_its_architectures_code(gpu: int, taken: int, harness: Harness) -> None:
    (lines,) = harness([default(gpu=gpu)])
    assert f"for sm_{taken} |" in lines[1]
    assert lines[-1] == "enqueued 0"


def swapped(op: Op, first: str, second: str, *, tokens: int = 1) -> str:
    """Return the default case with two inputs exchanged."""
    inputs = tensors(op, sizes_of(PUBLISHED[1], 2, tokens), "fp16")
    i = op.inputs.index(first)
    j = op.inputs.index(second)
    inputs[i], inputs[j] = inputs[j], inputs[i]
    return case(op, inputs, SCAN_FIELDS if op is SCAN else {"state_in_place": "i 0"})


def reshaped(op: Op, name: str, text: str) -> str:
    """Return the default case with another tensor for one input."""
    inputs = tensors(op, sizes_of(PUBLISHED[1], 2, 1), "fp16")
    inputs[op.inputs.index(name)] = text
    return case(op, inputs, SCAN_FIELDS if op is SCAN else {"state_in_place": "i 0"})


def without(name: str, **more: str) -> dict[str, str]:
    return {field: value for field, value in SCAN_FIELDS.items() if field != name} | more


FAULTS = {
    "swapped inputs, other ranks": (
        swapped(SCAN, "dt", "mask"),
        r"input dt is \[2, 1\], and should be \[batch 2, tokens 1, heads 24\]",
    ),
    "swapped inputs, other dtypes": (swapped(SCAN, "A", "mask"), r"^format 2$"),
    "swapped inputs of the convolution": (swapped(CONV, "state", "weight", tokens=2), "input state is"),
    "another number of heads": (reshaped(SCAN, "D", "f 1 25"), r"input D is \[25\], and should be \[heads 24\]"),
    "groups that do not divide the heads": (
        case(SCAN, tensors(SCAN, sizes_of(PUBLISHED[1]._replace(groups=5), 2, 1), "fp16"), SCAN_FIELDS),
        "24 heads cannot share 5 groups",
    ),
    "a wrong dtype": (reshaped(SCAN, "x", "d 4 2 1 24 64"), "^format 0$"),
    "an input too few": (case(SCAN, ["h 4 2 1 24 64"], SCAN_FIELDS), "1 inputs, and should be 9"),
    "a missing attribute": (default(fields=without("chunk_size")), "attribute chunk_size is missing"),
    "an attribute of another type": (
        default(fields=without("dt_min", dt_min="i 0")),
        "attribute dt_min is not one float32",
    ),
    "an attribute of two values": (
        default(fields=without("chunk_size", chunk_size="l 3")),
        "attribute chunk_size is not one int32",
    ),
    "an attribute that is not ours": (
        default(fields=SCAN_FIELDS | {"epsilon": "f 1"}),
        "there is no attribute epsilon",
    ),
    "limits in the wrong order": (default(fields=without("dt_max", dt_max="f 0.0001")), "dt_min and dt_max are 0.001"),
    "a shape without a kernel": (
        case(SCAN, tensors(SCAN, sizes_of(PUBLISHED[1]._replace(d_head=96), 2, 1), "fp16"), SCAN_FIELDS),
        "this library has no kernel decode for head dim 96 and state size 128",
    ),
    "channels that are not a multiple of 16": (
        case(CONV, tensors(CONV, sizes_of(PUBLISHED[1], 2, 1) | {"channels": 24}, "fp16"), {"state_in_place": "i 0"}),
        "24 channels, which should be a multiple of 16",
    ),
    "a GPU without machine code": (
        default(gpu=75),
        "kernel decode has no machine code for sm_75, only for sm_80 sm_86",
    ),
    "a newer GPU without machine code": (default(gpu=103), "no machine code for sm_103"),
    "machine code that the driver refuses": (
        default(refused=1),
        r"loading decode for sm_80: CUDA error 200 \(invalid image\)",
    ),
    "an engine of another library": (
        default(tamper=1),
        "was built with plugin library 0{32}, this one is [0-9a-f]{32}; load that one",
    ),
    "another dtype in the call": (
        default(
            called=tensors(SCAN, sizes_of(PUBLISHED[1], 2, 1), "fp16")[:1]
            + tensors(SCAN, sizes_of(PUBLISHED[1], 2, 1), "bf16")[1:]
        ),
        "SSMScan: input dt has another dtype than x",
    ),
    "float32 in the call": (
        default(CONV, called=[t.replace("h", "f") for t in tensors(CONV, sizes_of(PUBLISHED[1], 2, 1), "fp16")]),
        "CausalConv: input x has another dtype than fp16 or bf16",
    ),
    "another shape in the call": (
        default(
            called=tensors(SCAN, sizes_of(PUBLISHED[1]._replace(heads=23), 2, 1), "fp16")[:1]
            + tensors(SCAN, sizes_of(PUBLISHED[1], 2, 1), "fp16")[1:]
        ),
        "SSMScan: input dt is .* should be .*heads 23",
    ),
    "a size that is not known in the call": (
        default(
            CONV, called=[t.replace("3 2 1 ", "3 2 -1 ") for t in tensors(CONV, sizes_of(PUBLISHED[1], 2, 1), "fp16")]
        ),
        r"CausalConv: input x is \[2, -1, 1792\], and every size must be known",
    ),
    "no memory for the workspace": (
        default(tokens=2, broken=f"{len(SCAN.inputs) + 2}:null"),
        "SSMScan: the workspace has no memory",
    ),
    "a misaligned workspace": (
        default(tokens=2, broken=f"{len(SCAN.inputs) + 2}:odd"),
        "SSMScan: the workspace is not at a multiple of 16 bytes",
    ),
    "a state that should be in place and is not": (
        default(fields=without("state_in_place", state_in_place="i 1")),
        "the state and its output are not one memory",
    ),
}


for _op in (SCAN, CONV):
    for _place, _name in enumerate([*(f"input {name}" for name in _op.inputs), "output 0", "output 1"]):
        for _how, _said in (("null", "has no memory"), ("odd", "is not at a multiple of 16 bytes")):
            FAULTS[f"{_op.name} {_name} {_how}"] = (
                default(_op, 2, broken=f"{_place}:{_how}"),
                f"{_op.name}: {_name} {_said}",
            )
    for _tokens, _batch in ((0, 2), (1, 0)):
        _empty = tensors(_op, sizes_of(PUBLISHED[1], _batch, _tokens), "fp16")
        FAULTS[f"{_op.name} of {_batch} x {_tokens} tokens"] = (
            default(_op, called=_empty),
            f"{_op.name}: input x is .* has no elements",
        )


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str, harness: Harness) -> None:
    line, text = FAULTS[fault]
    (lines,) = harness([line])
    assert not any(printed.startswith("launch") or printed == "enqueued 0" for printed in lines)
    assert any(re.search(text, printed) for printed in lines), lines
    logged = [printed for printed in lines if printed.startswith("log")]
    assert all(printed.startswith("log 1 h1export::") for printed in logged)
    assert logged or text.startswith("^format")


def test_without_a_driver_it_loads_and_builds_and_does_not_run(harness: Harness) -> None:
    (lines,) = harness([default()], with_driver=False)
    assert lines[0].startswith("built")
    assert "CUDA's driver cannot be loaded" in lines[1]
    assert len(lines) == 2


def test_inputs_are_the_schemas(driver: Path) -> None:
    """The header has the inputs and attributes of the schemas in order, with shapes that the fake kernels accept."""
    assert (driver / "source" / "ops.h").read_text() == header()
    for op, function in zip(OPS, (h1.ssm_scan, h1.causal_conv), strict=True):
        declared = [argument.name for argument in function.default._schema.arguments]
        assert [*op.inputs, *(name for name, _ in op.attributes)] == declared
        assert ", ".join(op.inputs) in header()
        sizes = sizes_of(PUBLISHED[1], 2, 3)
        made = [torch.empty([sizes[size] for size in op.shapes[name].split()], device="meta") for name in op.inputs]
        y, state = function(*made, *((128, 0.0, 1.0) if op is SCAN else ()))
        assert (y.shape, state.shape) == (made[0].shape, made[op.inputs.index("state")].shape)


@pytest.fixture
def without_cmake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide the CMake of the system and that of the extra."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))


def test_the_library_is_built_once(
    driver: Path, stand_ins: list[Cubin], without_cmake: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library is kept in a cache whose key covers the machine code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(driver / "cache"))
    made = library(stand_ins)
    assert made == (driver / "libh1export_plugin.so").resolve()
    assert made.parent.name == digest(stand_ins, "") != digest(stand_ins[1:], "")
    assert digest(stand_ins).encode() in made.read_bytes()
    assert {path.name for path in made.parent.iterdir()} == {made.name, f"{made.name}.sha256"}
    with pytest.raises(H1ExportError, match="cmake is not installed"):
        library(stand_ins[1:])


def test_a_warning_stops_the_build_and_nothing_is_left(
    stand_ins: list[Cubin], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def with_a_warning(folder: Path, cubins: list[Cubin]) -> Path:
        for file in write_sources(folder, cubins).glob("*.cc"):
            file.write_text("static void unused() {}\n")
        return folder

    monkeypatch.setattr("h1export.targets.tensorrt.plugin.write_sources", with_a_warning)
    with pytest.raises(H1ExportError, match=r"cmake failed with exit code \d+: \w+\.cc:1:\d+: error: .*unused"):
        library(stand_ins[:1])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_without_cmake_the_error_says_so(without_cmake: None, tmp_path: Path) -> None:
    with pytest.raises(H1ExportError, match="cmake is not installed; install the extra trt"):
        build(tmp_path, tmp_path)


def test_the_resources_of_kernels_are_returned(
    stand_ins: list[Cubin], driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cubins = [replace(stand_ins[0], registers=40, spilled=8, shared=512)]
    monkeypatch.setattr("h1export.targets.tensorrt.plugin.compile_all", lambda *_: cubins)
    monkeypatch.setattr("h1export.targets.tensorrt.plugin.library", lambda _: driver / "libh1export_plugin.so")
    name = f"{cubins[0].kernel.symbol} sm_{cubins[0].architecture}"
    assert write(tmp_path / "plugin", [cubins[0].kernel], [80]) == {
        name: {"registers": 40, "spilled": 8, "shared": 512}
    }
    assert (tmp_path / "plugin" / "libh1export_plugin.so").is_file()
