"""Planted faults in a built package: validate reports FAIL, or the package is refused before it runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.progress import SILENT
from h1export.report.checks import CheckKind, Comparison
from h1export.report.report import Report
from h1export.targets.coreml.evaluator import Evaluator, Package
from h1export.targets.coreml.program import layout
from h1export.validate.accuracy.run import ValidateOptions, validate

Build = Callable[..., Artifact]
Changed = Callable[..., Artifact]
WEIGHT = "model_layers_1_feed_forward_down_proj_weight"


@pytest.fixture
def built(make_checkpoint: Callable[..., Path], build: Build) -> Artifact:
    return build(make_checkpoint(), "int4", target="coreml", max_context=96)


def judged(artifact: Artifact, checkpoint: Path) -> Report:
    runner = load_runner(artifact)
    return validate(artifact, runner, runner, checkpoint=checkpoint, options=ValidateOptions(pairs=0), progress=SILENT)


def failures(report: Report) -> set[str]:
    """The kinds and comparisons of the rows that fail."""
    return {name for row in report.rows if row.verdict == "FAIL" for name in (row.kind, row.comparison)}


def test_the_package_as_built_passes(built: Artifact, make_checkpoint: Callable[..., Path]) -> None:
    assert judged(built, make_checkpoint()).passed


def test_a_flipped_nibble(built: Artifact, make_checkpoint: Callable[..., Path], with_changed_bytes: Changed) -> None:
    def flip(data: Any) -> Any:
        data[5] ^= 0x08  # the sign of one code
        return data

    assert CheckKind.STORED_INTEGERS in failures(
        judged(with_changed_bytes(built, WEIGHT, "data", flip), make_checkpoint())
    )


def test_a_wrong_scale(built: Artifact, make_checkpoint: Callable[..., Path], with_changed_bytes: Changed) -> None:
    def double(data: Any) -> Any:
        scales = data.view(np.float16)
        scales[3] *= 2
        return data

    assert CheckKind.STORED_INTEGERS in failures(
        judged(with_changed_bytes(built, WEIGHT, "scale", double), make_checkpoint())
    )


def swap_states(model: Any) -> None:
    """decode swaps the keys and the values of layer 0 when it writes them."""
    names = {
        f"past_key_values_0_{kind}": f"past_key_values_0_{other}"
        for kind, other in (("key", "value"), ("value", "key"))
    }
    for operation in model.mlProgram.functions["decode"].block_specializations["CoreML8"].operations:
        for argument in operation.inputs["input"].arguments if operation.type == "write_state" else ():
            argument.name = names.get(argument.name, argument.name)


def stale_state(model: Any) -> None:
    """decode writes neither half of the recurrent state of layer 1; one half alone would hide the fault."""
    block = model.mlProgram.functions["decode"].block_specializations["CoreML8"]
    for operation in [operation for operation in block.operations if operation.type == "write_state"]:
        if operation.inputs["input"].arguments[0].name.startswith("past_key_values_1_recurrent_state"):
            block.operations.remove(operation)


@pytest.mark.parametrize("edit", [swap_states, stale_state])
def test_states_that_are_not_kept_as_they_should(
    edit: Callable[[Any], None], built: Artifact, make_checkpoint: Callable[..., Path], with_changed_program: Changed
) -> None:
    assert Comparison.STORED in failures(judged(with_changed_program(built, edit), make_checkpoint()))


def test_a_truncated_blob(built: Artifact, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built.folder, tmp_path / "cut"))
    os.truncate(folder / layout.WEIGHTS, (folder / layout.WEIGHTS).stat().st_size // 2)
    with pytest.raises(H1ExportError, match=r"weight.bin: has \d+ bytes, and the manifest says"):
        Artifact.open(folder)
    with pytest.raises(
        H1ExportError, match=r"weight.bin.*(end|cut|truncated|bytes)"
    ):  # the evaluator alone, without a manifest
        Evaluator(Package.open(folder / layout.PACKAGE), "decode")


@pytest.mark.parametrize(("function", "position"), [("decode", 96), ("prefill", 33)])
def test_a_call_past_the_end_of_the_cache(function: str, position: int, built: Artifact) -> None:
    evaluator = Evaluator(Package.open(built.folder / layout.PACKAGE), function)
    tokens = 1 if function == "decode" else 64

    def call(at: int) -> Any:
        given = {
            "input_ids": np.zeros((1, tokens), np.int32),
            "position": np.array([at], np.int32),
            "n_valid": np.array([1], np.int32),
        }
        return evaluator.run({name: given[name] for name in evaluator.function.inputs}, evaluator.initial_states())

    call(position - 1)
    with pytest.raises(H1ExportError, match=rf"function '{function}', op \w+ '.*': .*96"):
        call(position)
