"""Damaged programs: each is refused with a message, and none ends in a traceback."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreml_damage import DATA, Damage, change_model
from coremltools.proto import MIL_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.errors import H1ExportError
from h1export.targets.coreml.evaluator import Evaluator, Package

PROPERTY = settings(deadline=None, max_examples=150, derandomize=True)

ONE = ("fp32", (2,))


def doubling(mil: Any, factor: float = 2) -> Any:
    return mil.function({"x": ONE}, [mil.op("mul", {"x": "x", "y": mil.value(float(factor))}, {"y": ONE})], ["y"])


@pytest.fixture
def package(mil: Any) -> Path:
    """A package with a function ``main`` that doubles its input."""
    return mil.save({"main": doubling(mil)})


def of_type(model: Any, number: int) -> None:
    model.mlProgram.functions["main"].inputs[0].type.tensorType.dataType = number


def first_constant(change: Callable[[Any], object]) -> Damage:
    """Return the damage that changes the constant of the first operation."""

    def edit(model: Any) -> None:
        change(
            model.mlProgram.functions["main"]
            .block_specializations["CoreML8"]
            .operations[0]
            .inputs["y"]
            .arguments[0]
            .value
        )

    return change_model(edit)


def first_operation(change: Callable[[Any], object]) -> Damage:
    return change_model(
        lambda model: change(model.mlProgram.functions["main"].block_specializations["CoreML8"].operations[0])
    )


def of_list(value: Any) -> None:
    value.type.listType.type.tensorType.dataType = MIL_pb2.FLOAT32


def of_integers(value: Any) -> None:
    value.immediateValue.tensor.ints.values.append(1)


def of_bytes(value: Any) -> None:
    value.immediateValue.tensor.bytes.values = b"\0" * 3


def of_unknown_shape(value: Any) -> None:
    value.type.tensorType.dimensions.add().unknown.variadic = False


def without_rank(value: Any) -> None:
    value.type.tensorType.dimensions.add().unknown.variadic = True


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (change_model(lambda model: of_type(model, 99)), "input 'x': has elements of MIL type 99"),
        (
            change_model(
                lambda model: (
                    model.mlProgram.functions["main"].inputs.add().CopyFrom(model.mlProgram.functions["main"].inputs[0])
                )
            ),
            "twice",
        ),
        (
            first_operation(lambda op: setattr(op, "type", "sing")),
            "op sing 'y': is an op that the evaluator does not have; it has abs, ",
        ),
        (
            first_operation(lambda op: op.inputs["z"].CopyFrom(op.inputs["y"])),
            "op mul 'y': has inputs that the evaluator does not know: z",
        ),
        (first_operation(lambda op: op.inputs.pop("y")), "op mul 'y': lacks y"),
        (first_operation(lambda op: op.inputs["y"].arguments.add(name="x")), "op mul 'y': has 2 values for y"),
        (
            first_operation(lambda op: op.inputs["y"].ClearField("arguments")),
            "op mul 'y': has an input 'y' without a value",
        ),
        (
            first_operation(lambda op: op.inputs["y"].arguments[0].ClearField("binding")),
            "op mul 'y': has an input without a value",
        ),
        (
            first_operation(lambda op: setattr(op.inputs["x"].arguments[0], "name", "w")),
            "takes 'w', which no earlier operation computes",
        ),
        (
            first_operation(lambda op: setattr(op.outputs[0], "name", "w")),
            "function 'main': returns 'y', which no operation computes",
        ),
        (first_operation(lambda op: op.outputs[0].type.ClearField("type")), "op mul 'y': is of no type, not a tensor"),
        (first_operation(lambda op: setattr(op, "type", "const")), "op const 'y': is a const without a value"),
        (first_constant(of_list), "op mul 'y': is of listType, not a tensor"),
        (first_constant(of_integers), "op mul 'y': holds ints for elements of fp32"),
        (first_constant(of_bytes), "op mul 'y': holds 3 bytes for 1 elements of fp32"),
        (first_constant(lambda value: value.ClearField("value")), "holds a constant that is not a tensor"),
        (
            first_constant(lambda value: value.immediateValue.tensor.floats.values.append(1)),
            "holds 2 values for 1 elements of fp32",
        ),
        (first_constant(of_unknown_shape), r"holds a constant of unknown shape fp32\[\?\]"),
        (first_constant(without_rank), "has no fixed rank"),
    ],
)
def test_a_damaged_program_is_refused(package: Path, damage: Damage, what: str) -> None:
    damage(package)
    with pytest.raises(H1ExportError, match=what) as caught:
        Evaluator(Package.open(package))
    assert "\n" not in str(caught.value)


def test_a_constant_is_of_the_type_that_its_output_declares(mil: Any) -> None:
    const = mil.const("w", mil.value([1.0, 2.0]))
    const.outputs[0].type.CopyFrom(mil.type(("fp32", (3,))))
    package = Package.open(mil.save({"main": mil.function({}, [const], ["w"])}))
    with pytest.raises(H1ExportError, match=r"op const 'w': holds fp32\[2\], and is declared as fp32\[3\]"):
        Evaluator(package)


@PROPERTY
@given(st.data())
def test_no_damage_ends_in_a_traceback(mil: Any, data: st.DataObject) -> None:
    """After any change of its bytes, a program either runs or is refused."""
    operations = [
        mil.const("w", mil.value(np.ones((2, 3), np.float16))),
        mil.op("linear", {"x": "x", "weight": "w"}, {"l": ("fp16", (1, 2))}),
        mil.op("concat", {"values": ["l", "l"], "axis": mil.value(1)}, {"c": ("fp16", (1, 4))}),
        mil.op("read_state", {"input": "s"}, {"r": ("fp16", (1, 4))}),
        mil.op("add", {"x": "c", "y": "r"}, {"y": ("fp16", (1, 4))}),
        mil.op("write_state", {"input": "s", "data": "y"}, {}),
    ]
    path = mil.save({"main": mil.function({"x": ("fp16", (1, 3))}, operations, ["y"], states={"s": ("fp16", (1, 4))})})
    file = path / DATA / "model.mlmodel"
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    with suppress(H1ExportError):
        evaluator = Evaluator(Package.open(path))
        evaluator.run({"x": np.ones((1, 3), np.float16)}, evaluator.initial_states())
