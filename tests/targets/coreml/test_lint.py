"""Planted faults in a correct package: each is found by the check that is meant for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.targets.coreml.evaluator import Package
from h1export.targets.coreml.package.lint import lint
from h1export.targets.coreml.program import layout

Build = Callable[..., Artifact]
Edit = Callable[[Any], None]


@pytest.fixture
def planted(
    make_checkpoint: Callable[..., Path], build: Build, with_changed_program: Callable[..., Artifact]
) -> Callable[[Edit], set[str]]:
    """planted(edit) -> the rules that a package breaks once ``edit`` has changed its Model message."""
    built = build(make_checkpoint(), "int4", target="coreml", max_context=96)

    def plant(edit: Edit) -> set[str]:
        return {
            finding.rule for finding in lint(Package.open(with_changed_program(built, edit).folder / layout.PACKAGE))
        }

    return plant


def operations(model: Any, function: str = "decode") -> Any:
    return model.mlProgram.functions[function].block_specializations["CoreML8"].operations


def first(model: Any, op_type: str) -> Any:
    return next(operation for operation in operations(model) if operation.type == op_type)


def test_a_package_of_ours_is_clean(planted: Callable[[Edit], set[str]]) -> None:
    assert planted(lambda model: None) == set()


def test_an_op_that_nobody_declared(planted: Callable[[Edit], set[str]]) -> None:
    def edit(model: Any) -> None:
        first(model, "silu").type = "swish_of_tomorrow"

    assert "operations" in planted(edit)


def test_a_constant_beyond_fp16(planted: Callable[[Edit], set[str]]) -> None:
    def edit(model: Any) -> None:
        for operation in operations(model):
            value = operation.attributes["val"].immediateValue.tensor if operation.type == "const" else None
            if value is not None and len(value.bytes.values) == 2:  # one fp16
                value.bytes.values = np.array(70000.0).astype(np.float16).tobytes()
                return

    with np.errstate(over="ignore"):
        assert "constants" in planted(edit)


def test_a_blob_beyond_the_file(planted: Callable[[Edit], set[str]]) -> None:
    def edit(model: Any) -> None:
        first(model, "constexpr_blockwise_shift_scale").inputs["data"].arguments[0].value.blobFileValue.offset += (
            1 << 40
        )

    assert "constants" in planted(edit)


def test_scales_that_do_not_divide_their_integers(planted: Callable[[Edit], set[str]]) -> None:
    def edit(model: Any) -> None:
        scale = first(model, "constexpr_blockwise_shift_scale").inputs["scale"].arguments[0].value.type.tensorType
        scale.dimensions[1].constant.size += 1

    assert "blocks" in planted(edit)


def test_states_that_differ_between_functions(planted: Callable[[Edit], set[str]]) -> None:
    def edit(model: Any) -> None:
        port = next(port for port in model.mlProgram.functions["decode"].inputs if port.name.endswith("_conv_state"))
        port.type.stateType.wrappedType.tensorType.dimensions[1].constant.size += 1

    assert "states" in planted(edit)


def test_a_state_that_nothing_writes(planted: Callable[[Edit], set[str]]) -> None:
    def edit(model: Any) -> None:
        block = model.mlProgram.functions["decode"].block_specializations["CoreML8"]
        block.operations.remove(first(model, "write_state"))

    assert "states" in planted(edit)


def test_a_declared_shape_that_is_not_the_computed_one(planted: Callable[[Edit], set[str]]) -> None:
    def edit(model: Any) -> None:
        first(model, "silu").outputs[0].type.tensorType.dimensions[2].constant.size += 1

    assert {"calls", "reload"} <= planted(edit)


def test_room_for_fewer_tokens_than_it_says(planted: Callable[[Edit], set[str]]) -> None:
    assert planted(lambda model: model.description.metadata.userDefined.update(max_context="97")) == {"calls"}


def test_a_position_that_nothing_bounds(planted: Callable[[Edit], set[str]]) -> None:
    """The metadata states fewer tokens than there is room for, so a call beyond them does not fail."""
    assert planted(lambda model: model.description.metadata.userDefined.update(max_context="95")) == {"calls"}


def test_a_tensor_of_rank_6(planted: Callable[[Edit], set[str]]) -> None:
    def edit(model: Any) -> None:
        kind = first(model, "expand_dims").outputs[0].type.tensorType
        while len(kind.dimensions) < 6:
            kind.dimensions.add().constant.size = 1
        kind.rank = 6

    assert "dimensions" in planted(edit)


def test_what_only_the_neural_engine_does_not_take(make_checkpoint: Callable[..., Path], build: Build) -> None:
    package = Package.open(build(make_checkpoint(), "int4", target="coreml", max_context=96).folder / layout.PACKAGE)
    found = {finding.what for finding in lint(package, neural_engine=True)}
    assert "has scales per group" in found
    assert any("not a multiple of 32" in what for what in found)


def test_a_description_that_is_not_the_programs(planted: Callable[[Edit], set[str]]) -> None:
    def edit(model: Any) -> None:
        model.description.functions[0].input[0].name = "tokens"

    assert "description" in planted(edit)
