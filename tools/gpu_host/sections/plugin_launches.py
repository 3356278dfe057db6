"""Section (c): the TensorRT plugin's launches on CUDA's driver, against references in float64, and bad arguments.

TensorRT itself takes no part: the harness calls the plugin as TensorRT would. In a dry run a stand-in for the driver
records the launches, and each must be the one of launch.py, argument for argument.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from roofline import Shape

from gpu_host import plugin_bundle
from gpu_host.bundle import PLUGIN
from gpu_host.plugin_driver import (
    CONV,
    SCAN,
    SCAN_FIELDS,
    STAND_IN,
    Harness,
    case,
    expected,
    layout,
    sizes_of,
    stand_ins,
    tensors,
    workspace_start,
)
from gpu_host.section import Host, Row
from h1export.plugins.causal_conv import launch as conv
from h1export.plugins.gpu.kernel import DTYPES as NAMES
from h1export.plugins.ssm_scan import launch as scan
from h1export.targets.tensorrt.plugin import NAME
from h1export.targets.tensorrt.plugin.schema import Op

Tensors = Mapping[str, torch.Tensor]
DTYPES = {name: dtype for dtype, name in NAMES.items() if name in plugin_bundle.DTYPES}
BATCH = 2
DRY = ("embedded",)  # the models of a dry run: compiling a library takes the most time
TOKENS = (1, 2, 300)  # decode, less than a tile, several chunks of which the last is ragged
DT_MIN = 0.001
SCAN_TOLERANCE = 3e-6  # some dozens of roundings at float32's 6e-8, as in the tests of the kernels
CONV_TOLERANCE = 2e-6
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}


@dataclass(frozen=True)
class Call:
    """A call of the plugin with valid arguments.

    Attributes:
        op: the op.
        shape: the model whose layer it is.
        dtype: "fp16" or "bf16".
        tokens: the number of tokens.
        in_place: whether the new state is written over the state.
    """

    op: Op
    shape: Shape
    dtype: str
    tokens: int
    in_place: bool

    @property
    def name(self) -> str:
        """The name of the call in the section's rows."""
        where = "state in place" if self.in_place else "state beside"
        return f"{self.op.name} {self.shape.model} {self.dtype} batch {BATCH} tokens {self.tokens} {where}"

    @property
    def fields(self) -> dict[str, str]:
        """The attributes of the layer."""
        given = {"state_in_place": f"i {int(self.in_place)}"}
        return SCAN_FIELDS | given if self.op is SCAN else given

    def line(self, data: Path) -> str:
        """Return the line for the harness; ``data`` is the folder of the inputs and outputs."""
        given = tensors(self.op, sizes_of(self.shape, BATCH, self.tokens), self.dtype)
        gpu = plugin_bundle.ARCHITECTURE
        return case(self.op, given, self.fields, gpu=gpu, in_place=int(self.in_place), data=data)

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return random inputs by name, where the first sequence has a pad on its left."""
        sizes = sizes_of(self.shape, BATCH, self.tokens)
        generator = torch.Generator().manual_seed(self.tokens)
        made = {
            name: torch.randn(*(sizes[size] for size in self.op.shapes[name].split()), generator=generator)
            for name in self.op.inputs
        }
        if self.op is SCAN:
            made |= {"A": -torch.exp(made["A"] * 0.7 + 1), "dt_bias": made["dt_bias"] * 1.5 - 2}
            made["mask"] = torch.ones_like(made["mask"])
            made["mask"][0, : min(1, self.tokens - 1)] = 0
        own = DTYPES[self.dtype]
        return {
            name: value.to(own if self.op.kind(name) == "*dtype" else torch.float32) for name, value in made.items()
        }

    def launches(self) -> tuple[list[str], int]:
        """Return the lines that the stand-in writes for the call, and the bytes of the workspace."""
        if self.op is CONV:
            kernel = conv.kernel(self.dtype, self.shape.taps, True, one_token=self.tokens == 1)
            launched = (conv.launch(kernel, BATCH, self.tokens, channels=self.shape.channels),)
            parts, size = dict[str, int](), 0
        else:
            shape = self.shape
            problem = scan.Problem(
                BATCH,
                self.tokens,
                shape.heads,
                groups=shape.groups,
                d_head=shape.d_head,
                d_state=shape.d_state,
                dtype=self.dtype,
                dt_min=DT_MIN,
                dt_max=float("inf"),
            )
            launched = scan.launches(problem)
            parts, size = layout(problem, workspace_start(SCAN))
        gpu = plugin_bundle.ARCHITECTURE
        return list(expected(self.op, launched, gpu, in_place=self.in_place, parts=parts)), size


def run(host: Host) -> Iterator[Row]:
    """Yield a row for each call with valid arguments, and one for each bad argument."""
    folder = host.bundle / PLUGIN
    environment = dict(os.environ)
    if host.dry:
        folder = host.work / PLUGIN
        if not folder.exists():
            plugin_bundle.build(folder, stand_ins, DRY)
        environment["LD_LIBRARY_PATH"] = str(folder / STAND_IN)
    for name, shape in plugin_bundle.shapes().items():
        if host.dry and name not in DRY:
            continue
        harness = Harness(folder, folder / name / NAME, environment)
        yield from _calls(host, harness, shape)
    for name, faults in ((plugin_bundle.OTHER, ELSEWHERE_FAULTS), ("embedded", embedded_faults())):
        yield from _faults(Harness(folder, folder / name / NAME, environment), faults)


def _calls(host: Host, harness: Harness, shape: Shape) -> Iterator[Row]:
    calls = [
        Call(op, shape, dtype, tokens, in_place)
        for op in (SCAN, CONV)
        for dtype in DTYPES
        for tokens in TOKENS
        for in_place in (False, True)
    ]
    folders = [host.work / "plugin_calls" / shape.model / str(index) for index in range(len(calls))]
    for call, folder in zip(calls, folders, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        for index, value in enumerate(call.inputs().values()):
            (folder / f"{index}.bin").write_bytes(_bytes(value))
    printed = harness([call.line(folder) for call, folder in zip(calls, folders, strict=True)])
    for index, (call, folder) in enumerate(zip(calls, folders, strict=True)):
        lines = printed[index] if index < len(printed) else ["the process ended before this call"]
        yield recorded(call, lines) if host.dry else compared(call, lines, folder)


def recorded(call: Call, lines: Sequence[str]) -> Row:
    """Return the row of a call over the stand-in: its launches are those of launch.py."""
    launched, size = call.launches()
    state = call.op.inputs.index("state")
    wanted = [f"built {state if call.in_place else -1} 0 {state} {size}", *launched, "enqueued 0"]
    wrong = [f"{found} is not {line}" for found, line in zip(lines, wanted, strict=False) if found != line]
    if len(lines) != len(wanted):
        wrong.append(f"{len(lines)} lines, and should be {len(wanted)}")
    return Row(call.name, not wrong, {"launches": len(launched)}, "\n".join(wrong[:2]))


@lru_cache(maxsize=2)  # a call in place has the inputs of the one before it
def references(op: str, shape: Shape, dtype: str, *, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return y and the state of a call in float64, each with the same of absolute values, which give its size."""
    scans = op == SCAN.name
    inputs = Call(SCAN if scans else CONV, shape, dtype, tokens, False).inputs()
    reference = scan_in_float64 if scans else convolution_in_float64
    return list(zip(reference(inputs, False), reference(inputs, True), strict=True))


def compared(call: Call, lines: Sequence[str], folder: Path) -> Row:
    """Return the row of a call on a GPU: nothing was printed but success, and the outputs are those of float64."""
    if not lines or lines[-1] != "enqueued 0" or any(not line.startswith(("built", "enqueued")) for line in lines):
        return Row(call.name, False, {}, "\n".join(lines[-3:]))
    own, rounding = DTYPES[call.dtype], ROUNDING[call.dtype]
    limits = (SCAN_TOLERANCE + 2 * rounding, SCAN_TOLERANCE + rounding**2)
    if call.op is CONV:
        limits = (CONV_TOLERANCE + rounding, 0.0)  # the state is a copy of inputs
    figures = {}
    for index, (exact, size) in enumerate(references(call.op.name, call.shape, call.dtype, tokens=call.tokens)):
        data = (folder / f"out{index}.bin").read_bytes()
        dtype = torch.float32 if index and call.op.kind("state") != "*dtype" else own
        if len(data) != exact.numel() * dtype.itemsize:
            return Row(call.name, False, {}, f"output {index} has {len(data)} bytes")
        found = torch.frombuffer(bytearray(data), dtype=dtype).view(exact.shape).double()
        error = float(((found - exact).abs().max() / size.abs().max()).nan_to_num(nan=torch.inf))
        figures["state_error" if index else "y_error"] = error
    passed = figures["y_error"] <= limits[0] and figures["state_error"] <= limits[1]
    return Row(call.name, passed, figures, "" if passed else f"limits {limits[0]:.1e} and {limits[1]:.1e}")


def scan_in_float64(inputs: Tensors, absolute: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y and the last state of the scan; ``absolute`` drops the signs, so that nothing cancels.

    All tokens are computed at once, each from all tokens before it: token s adds exp(the sum of dt A after s) dt x B.
    """
    held = {name: value.double() for name, value in inputs.items()}
    x, B, C, D, state = (held[name].abs() if absolute else held[name] for name in ("x", "B", "C", "D", "state"))
    repeat = x.shape[2] // B.shape[2]
    B, C = (each.repeat_interleave(repeat, 2).transpose(1, 2) for each in (B, C))  # [batch, heads, tokens, d_state]
    dt = torch.nn.functional.softplus(held["dt"] + held["dt_bias"]).clamp(min=DT_MIN) * held["mask"][..., None]
    since = (dt * held["A"]).transpose(1, 2).cumsum(2)  # log decay since the start, [batch, heads, tokens]
    between = (since[..., :, None] - since[..., None, :]).tril().exp().tril()
    drive = (dt[..., None] * x).transpose(1, 2)
    y = (between * (C @ B.mT)) @ drive + since.exp()[..., None] * (C @ state.mT)
    state = since[..., -1].exp()[..., None, None] * state + (between[..., -1, :, None] * drive).mT @ B
    return y.transpose(1, 2) + D[:, None] * x, state


def convolution_in_float64(inputs: Tensors, absolute: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y and the last state of the convolution; ``absolute`` gives y's terms before they cancel."""
    x, state, weight, bias = (inputs[name].double() for name in ("x", "state", "weight", "bias"))
    rows = torch.cat([state, x.transpose(1, 2)], -1)
    terms = rows.unfold(2, weight.shape[2], 1) * weight
    total = terms.abs().sum(-1) + bias.abs()[:, None] if absolute else terms.sum(-1) + bias[:, None]
    y = total if absolute else torch.nn.functional.silu(total)
    return y.transpose(1, 2), rows[:, :, -state.shape[2] :]


@dataclass(frozen=True)
class Fault:
    """A call with a bad argument: what is bad, the line for the harness, and a pattern of what is said of it."""

    name: str
    line: str
    said: str


def layer(op: Op, tokens: int = 2, dtype: str = "fp16", **sizes: int) -> list[str]:
    """Return the inputs of a layer of the embedded model with ``sizes`` changed."""
    return tensors(op, sizes_of(plugin_bundle.shapes()["embedded"], BATCH, tokens) | sizes, dtype)


def _line(op: Op, inputs: Sequence[str], broken: str = "-", *, called: Sequence[str] = ()) -> str:
    fields = SCAN_FIELDS if op is SCAN else {"state_in_place": "i 0"}
    return case(op, inputs, fields, gpu=plugin_bundle.ARCHITECTURE, broken=broken, called=called)


def embedded_faults() -> list[Fault]:
    """Return every kind of bad argument, for the embedded model's library."""
    made = []
    for op in (SCAN, CONV):
        good = layer(op)
        mixed = [*layer(op)[:1], *layer(op, dtype="bf16")[1:]]
        second, of_x = op.inputs[1], rf"{op.name}: input x is .* has no elements"
        made += [
            Fault(f"{op.name} of other sizes", _line(op, good, called=[*layer(op, batch=3)[:1], *good[1:]]), second),
            Fault(f"{op.name} of two dtypes", _line(op, good, called=mixed), f"input {second} has another dtype"),
            Fault(f"{op.name} of no tokens", _line(op, good, called=layer(op, 0)), of_x),
        ]
        for place, name in enumerate([*(f"input {name}" for name in op.inputs), "output 0", "output 1"]):
            made += [
                Fault(f"{op.name} {name} null", _line(op, good, f"{place}:null"), f"{op.name}: {name} has no memory"),
                Fault(f"{op.name} {name} misaligned", _line(op, good, f"{place}:odd"), f"{op.name}: {name} is not at"),
            ]
    workspace = len(SCAN.inputs) + 2
    no_kernel = "SSMScan: .*no kernel .*head dim 96"
    return [
        *made,
        Fault("workspace null", _line(SCAN, layer(SCAN), f"{workspace}:null"), "SSMScan: the workspace has no memory"),
        Fault("workspace misaligned", _line(SCAN, layer(SCAN), f"{workspace}:odd"), "SSMScan: the workspace is not at"),
        Fault("no kernel for the shape", _line(SCAN, layer(SCAN, d_head=96)), no_kernel),
    ]


# A layer whose dtype and shape the library has, for a GPU that it has no code for.
ELSEWHERE_FAULTS = [
    Fault(
        "no code for the GPU",
        _line(SCAN, layer(SCAN, 1)),
        f"SSMScan: kernel decode has no machine code for sm_{plugin_bundle.ARCHITECTURE}",
    )
]


def _faults(harness: Harness, faults: Sequence[Fault]) -> Iterator[Row]:
    """Yield a row for each fault, and one for a good call after all of them in the same process."""
    good = [_line(op, layer(op)) for op in (SCAN, CONV)] if len(faults) > 1 else []
    printed = harness([*(fault.line for fault in faults), *good])
    for index, fault in enumerate(faults):
        lines = printed[index] if index < len(printed) else ["the process ended before this call"]
        yield Row(f"bad argument: {fault.name}", refused(fault, lines), {}, "\n".join(lines[-3:]))
    if good:
        after = printed[len(faults) :]
        passed = len(after) == len(good) and all(lines[-1] == "enqueued 0" for lines in after)
        yield Row("good calls after all bad arguments", passed, {}, "" if passed else str(after))


def refused(fault: Fault, lines: Sequence[str]) -> bool:
    """Return whether the fault is named in the log, nothing ran, nothing died, and CUDA has no error."""
    bad: Callable[[str], bool] = re.compile("launch|enqueued 0$|cuda |died").match  # type: ignore[assignment]
    return not any(map(bad, lines)) and any(re.search(fault.said, line) for line in lines if line.startswith("log 1"))


def _bytes(value: torch.Tensor) -> bytes:
    return value.contiguous().view(torch.uint8).numpy().tobytes()
