"""A stranger's graph over our kernels: what does not fit is an error of its node, and never a read or write outside.

tools/sanitize has the same with sanitizers, at random and in large numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from sanitize import artifacts

from h1export import cli
from h1export.artifact.artifact import Artifact
from h1export.targets.onnxruntime.inference_session import NATIVE_MODEL
from h1export.targets.onnxruntime.native_library import compiled

RunOp = Callable[..., list[Any]]
Build = Callable[..., Artifact]
WRAPPING = (2**61, 2**62, 2**63 - 1, 2**63 - 16, -(2**63), -1)  # products and sums with them leave 64 bits
SIZES = (*WRAPPING, 0, 2**31, 2**32 + 8)


@pytest.fixture(scope="module")
def run_op(run_on: Callable[[str], RunOp]) -> RunOp:
    """One library: checks come before kernels, whose variants differ."""
    return run_on(str(compiled()))


def floats(*shape: int) -> Any:
    return np.ones(shape, np.float32)


SCALES = np.ones((8, 2), np.float16)
WEIGHTS = {"codes": np.ones((8, 2, 16), np.uint8), "scales": SCALES, "factors": floats(8), "bias": floats(8)}
PRODUCT = {"K": 64, "N": 8, "bits": 4, "block_size": 32, "accuracy_level": 4}
# op -> (inputs, outputs, attributes) that fit
VALID: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "QMatMul": ({"x": floats(1, 3, 64), **WEIGHTS}, 1, PRODUCT),
    "NormQMatMul": (
        {"a": floats(1, 3, 64), "b": floats(1, 3, 64), "norm": floats(64), **WEIGHTS},
        2,
        PRODUCT | {"epsilon": 1e-5},
    ),
    "PairQMatMul": (
        {"a": floats(1, 3, 24), "b": floats(1, 3, 40), **WEIGHTS},
        1,
        PRODUCT | {"a_factor": 1.0, "b_factor": 1.0},
    ),
    "SiluQMatMul": (
        {"a": floats(1, 3, 70), "gate": floats(1, 3, 70), **WEIGHTS},
        1,
        PRODUCT | {"a_offset": 6, "gate_offset": 0},
    ),
    "SiluMul": ({"a": floats(1, 3, 9), "gate": floats(1, 3, 9)}, 1, {"a_offset": 1, "gate_offset": 0, "width": 8}),
    "CausalConv": (
        {
            "x": floats(2, 3, 10),
            "state": floats(2, 3, 8),
            "weight": floats(4, 8),
            "bias": floats(8),
            "mask": floats(2, 3),
        },
        2,
        {"offset": 2},
    ),
    "SSMScan": (
        {
            "xbc": floats(2, 3, 2 * 8 + 2 * 4),
            "dt": floats(2, 3, 3),
            "A": floats(2),
            "D": floats(2),
            "dt_bias": floats(2),
            "state": floats(2, 2, 4, 8),
            "mask": floats(2, 3),
            "gate": floats(2, 3, 17),
        },
        2,
        {"heads": 2, "groups": 1, "d_head": 8, "d_state": 4, "dt_offset": 1, "gate_offset": 1}
        | {"dt_min": 0.0, "dt_max": 1.0},
    ),
    "Attention": (
        {
            "qkv": floats(2, 3, 32),
            "cos": floats(2, 3, 4),
            "sin": floats(2, 3, 4),
            "mask": np.ones((2, 5), np.int64),
            "past_k": floats(2, 1, 2, 8),
            "past_v": floats(2, 1, 2, 8),
        },
        3,
        {"num_heads": 2, "kv_heads": 1, "head_dim": 8, "q_offset": 0, "k_offset": 16, "v_offset": 24, "scale": 0.5},
    ),
}
INTEGERS = [(op, name) for op, (_, _, given) in VALID.items() for name in given if isinstance(given[name], int)]
REALS = [(op, name) for op, (_, _, given) in VALID.items() for name in given if isinstance(given[name], float)]
INPUTS = [(op, name) for op, (inputs, _, _) in VALID.items() for name in inputs]
OPTIONAL = {"factors", "bias", "gate", "mask"} - {"x"}
# an offset of 0 is right, and so is a kernel of float32
RIGHT = {("a_offset", 0), ("gate_offset", 0), ("offset", 0), ("dt_offset", 0), ("q_offset", 0), ("k_offset", 0)} | {
    ("v_offset", 0),
    ("accuracy_level", 0),
}


def of_tokens(op: str, tokens: int, *, past: int = 2) -> dict[str, Any]:
    """The inputs of VALID, which have 3 tokens after 2, for other numbers of them."""
    inputs = dict(VALID[op][0])
    for name, value in inputs.items():
        if name == "mask" and op == "Attention":
            inputs[name] = np.ones((2, past + tokens), np.int64)
        elif name in ("past_k", "past_v"):
            inputs[name] = floats(2, 1, past, 8)
        elif value.ndim > 1 and value.shape[1] == 3 and name != "state":
            inputs[name] = np.repeat(value[:, :1], tokens, axis=1)
    return inputs


@pytest.mark.parametrize("tokens", [1, 2, 9, 17])
@pytest.mark.parametrize("op", VALID)
def test_what_an_earlier_call_left_is_not_read(run_op: RunOp, op: str, tokens: int) -> None:
    """Threads keep their memory from call to call: after numbers that are NaN, results are those of before."""
    _, outputs, attributes = VALID[op]
    inputs = of_tokens(op, tokens)
    longer = of_tokens(op, tokens, past=100)
    spoilt = {name: np.full_like(value, np.nan) if value.dtype.kind == "f" else value for name, value in longer.items()}
    expected = run_op(op, inputs, outputs, threads=1, **attributes)
    assert all(np.isfinite(array).all() for array in expected)
    run_op(op, spoilt, outputs, threads=1, **attributes)
    for found, right in zip(run_op(op, inputs, outputs, threads=1, **attributes), expected, strict=True):
        np.testing.assert_array_equal(found, right)


def run(run_op: RunOp, op: str, inputs: dict[str, Any] | None = None, **attributes: Any) -> list[Any]:
    given, outputs, valid = VALID[op]
    return run_op(op, given | (inputs or {}), outputs=outputs, **valid | attributes)


def refused(run_op: RunOp, op: str, inputs: dict[str, Any] | None = None, **attributes: Any) -> str:
    """What the node says; ONNX Runtime's own checks of a graph name the node too."""
    with pytest.raises(Exception, match=op) as caught:
        run(run_op, op, inputs, **attributes)
    return str(caught.value)


@pytest.mark.parametrize("op", VALID)
def test_what_fits_is_computed(op: str, run_op: RunOp) -> None:
    assert all(np.isfinite(output).all() for output in run(run_op, op))


@pytest.mark.parametrize(("op", "name"), INTEGERS)
def test_an_integer_that_does_not_fit(op: str, name: str, run_op: RunOp) -> None:
    valid = VALID[op][2][name]
    for value in (*SIZES, valid + 2**32, valid + 2**63 - 2**62 if valid else 2**62):
        if (name, value) not in RIGHT:
            assert refused(run_op, op, **{name: value}).startswith("[ONNXRuntimeError]"), value


@pytest.mark.parametrize(("op", "name"), REALS)
def test_a_number_that_does_not_fit(op: str, name: str, run_op: RunOp) -> None:
    assert f"attribute {name} is not a number" in refused(run_op, op, **{name: float("nan")})


@pytest.mark.parametrize(("op", "name"), INPUTS)
def test_an_input_of_another_rank(op: str, name: str, run_op: RunOp) -> None:
    """A scalar, a dimension too few, too many, and one without elements."""
    value = VALID[op][0][name]
    flat = value.ravel()
    changed = [flat[:1].reshape(()), value[..., :0]]
    changed += [flat] if value.ndim > 1 and name not in ("x", "a", "b", "gate") else []
    changed += [value[None]] if name not in ("x", "a", "b", "gate") or op == "SSMScan" else []
    for other in changed:
        message = refused(run_op, op, {name: np.array(other, order="C")})
        assert "rank" in message or other.size == 0, message


@pytest.mark.parametrize(("op", "name"), INPUTS)
def test_an_input_with_one_size_changed(op: str, name: str, run_op: RunOp) -> None:
    value = VALID[op][0][name]
    for axis in range(value.ndim):
        for count in (0, value.shape[axis] + 1):
            shape = [*value.shape]
            shape[axis] = count
            if (op, name, axis) in WIDER and (count or op == "QMatMul"):
                continue
            refused(run_op, op, {name: np.ones(shape, value.dtype)})


# a last axis may be wider than what is read of it; a past may have more rows than there are tokens
WIDER = {("SiluMul", "a", 2), ("SiluMul", "gate", 2), ("SiluQMatMul", "a", 2), ("SiluQMatMul", "gate", 2)} | {
    ("CausalConv", "x", 2),
    ("SSMScan", "dt", 2),
    ("SSMScan", "gate", 2),
    ("Attention", "qkv", 2),
    ("QMatMul", "x", 0),
    ("QMatMul", "x", 1),
}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in INPUTS if name not in OPTIONAL])
def test_an_input_that_is_missing(op: str, name: str, run_op: RunOp) -> None:
    with pytest.raises(Exception, match=op):
        run(run_op, op, {name: None})


def test_a_mask_of_attention_is_not_optional(run_op: RunOp) -> None:
    with pytest.raises(Exception, match="Attention"):
        run(run_op, "Attention", {"mask": None})


def test_a_cache_in_int8_with_one_size_changed(run_op: RunOp) -> None:
    caches = {name: np.ones((2, 1, 2, 34), np.int8) for name in ("past_k", "past_v")}
    tables = {name: floats(2, 3, 16) for name in ("cos", "sin")}
    fits = {"qkv": floats(2, 3, 128), **tables, **caches}
    sizes = {"head_dim": 32, "k_offset": 64, "v_offset": 96}
    assert len(run(run_op, "Attention", fits, **sizes)) == 3
    for name, value in caches.items():
        for axis in range(4):
            for count in (0, value.shape[axis] + 1, 32):
                shape = [*value.shape]
                shape[axis] = count
                refused(run_op, "Attention", fits | {name: np.ones(shape, np.int8)}, **sizes)
    for dim in (2**16, 24, 2**62):
        refused(run_op, "Attention", fits, **sizes | {"head_dim": dim})


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        ("CausalConv", {"x": (2**40, 0, 10), "state": (2**40, 0, 8), "weight": (1, 8), "mask": (2**40, 0)}),
        (
            "Attention",
            {
                "qkv": (2**40, 0, 32),
                "cos": (2**40, 0, 4),
                "sin": (2**40, 0, 4),
                "mask": (2**40, 0),
                "past_k": (2**40, 1, 0, 8),
                "past_v": (2**40, 1, 0, 8),
            },
        ),
    ],
    ids=["CausalConv", "Attention"],
)
def test_a_huge_batch_of_nothing_ends_at_once(op: str, shapes: dict[str, Any], run_op: RunOp) -> None:
    inputs = VALID[op][0]
    outputs = run(run_op, op, {name: np.ones(shape, inputs[name].dtype) for name, shape in shapes.items()})
    assert {output.size for output in outputs} == {0}


@pytest.fixture(scope="module")
def artifact(tiny: Path, build: Build) -> Artifact:
    return build(tiny, "int4")


def test_mutated_graphs_end_in_one_line_or_in_logits(artifact: Artifact, tmp_path: Path) -> None:
    clean = onnx.load(artifact.folder / NATIVE_MODEL, load_external_data=False)
    rng = random.Random(0)
    found = set()
    for _ in range(25):
        model = onnx.ModelProto()
        model.CopyFrom(clean)
        artifacts.mutate(model, rng)
        artifacts.write(artifact.folder, tmp_path / "mutated", model)
        found.add(artifacts.use(tmp_path / "mutated"))
    assert found == {"right", "refused"}


@pytest.mark.parametrize(
    ("op", "name", "value"),
    [
        ("Attention", "q_offset", 2**63 - 16),
        ("SSMScan", "d_head", 2**62),
        ("QMatMul", "N", 7),
        ("CausalConv", "offset", 2**31 - 1),
    ],
)
def test_the_command_ends_in_one_line(
    op: str, name: str, value: int, artifact: Artifact, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(artifact.folder / NATIVE_MODEL, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == op)
    next(attribute for attribute in node.attribute if attribute.name == name).i = value
    artifacts.write(artifact.folder, tmp_path / "mutated", model)
    words = ["generate", str(tmp_path / "mutated"), "a", "--max-tokens", "2", "--kernels", "native"]
    code = cli.run(words)
    lines = capfd.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("h1export: ")
    assert op in lines[0]
