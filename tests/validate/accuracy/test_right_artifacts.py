"""Right artifacts of random models pass the default tolerances whatever the seed, and the same ones with a fault fail.

A few models run always, and thirty in `nox -s selftest`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import Sample, sample

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.progress import SILENT
from h1export.report.report import Report, Verdict
from h1export.validate.accuracy.run import ValidateOptions, validate

pytestmark = pytest.mark.ort
Build = Callable[..., Artifact]
MakeCheckpoint = Callable[..., Path]

ALWAYS = (7, 12, 20)  # 12 chooses another token at one of three positions
MANY = tuple(number for number in range(30) if number not in ALWAYS)
NUMBERS = [*ALWAYS, *(pytest.param(number, marks=pytest.mark.slow) for number in MANY)]

# config key, or key and place in its list: the fault is an artifact without the multiplier
MULTIPLIERS: tuple[Any, ...] = (
    "embedding_multiplier",
    "key_multiplier",
    "attention_in_multiplier",
    "attention_out_multiplier",
    "ssm_in_multiplier",
    "ssm_out_multiplier",
    "lm_head_multiplier",
    *(("ssm_multipliers", place) for place in range(5)),
    *(("mlp_multipliers", place) for place in range(2)),
)
STATES = ("recurrent_state", "conv_state", "key", "value")  # the fault hands back the one that it was given
FAULTS: tuple[Any, ...] = (*MULTIPLIERS, *STATES, "rope")


def judge(artifact: Artifact, checkpoint: Path, seed: int, change: Callable[[Any], None] | None = None) -> Report:
    shipped: Any = load_runner(artifact)
    exact: Any = shipped if shipped.provenance.float32 else load_runner(artifact, float32=True)
    for runner in {id(one): one for one in (shipped, exact)}.values():
        if change is not None:
            change(runner)
    options = ValidateOptions(pairs=0, seed=seed)
    return validate(artifact, shipped, exact, checkpoint=checkpoint, options=options, progress=SILENT)


def built(model: Sample, checkpoint: Path, build: Build) -> Artifact:
    return build(checkpoint, model.quant, model.group_size, accuracy_level=model.accuracy_level)


def failed(report: Report) -> list[str]:
    """What is beyond its tolerance, in the words of a reader."""
    return [
        f"{row.comparison} {row.case}: {name} {value:.3g}, tolerance {row.tolerances.get(name)}"
        for row in report.rows
        if row.verdict is Verdict.FAIL
        for name, value in row.figures.items()
        if not row.keeps(name)
    ]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_right_artifact_passes(number: int, make_checkpoint: MakeCheckpoint, build: Build) -> None:
    model = sample(number)
    checkpoint = make_checkpoint(seed=model.seed, **model.config)
    report = judge(built(model, checkpoint, build), checkpoint, seed=number)
    assert failed(report) == []
    assert report.passed


@pytest.mark.parametrize("number", NUMBERS)
def test_the_same_artifact_with_a_fault_fails(
    number: int, make_checkpoint: MakeCheckpoint, build: Build, tmp_path: Path
) -> None:
    model = sample(number)
    checkpoint = make_checkpoint(seed=model.seed, **model.config)
    fault = FAULTS[number % len(FAULTS)]
    if fault in STATES:
        name = f"past_key_values.0.{fault}"
        report = judge(built(model, checkpoint, build), checkpoint, number, lambda runner: make_stale(runner, name))
    else:
        wrong = without(checkpoint, tmp_path / "wrong", fault)
        report = judge(built(model, wrong, build), checkpoint, number)
    assert not report.passed


def without(checkpoint: Path, folder: Path, fault: Any) -> Path:
    """A copy of the checkpoint whose config lacks a multiplier, or has another base of the rotary embedding."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    if fault == "rope":
        config["rope_parameters"]["rope_theta"] = 1e4
    elif isinstance(fault, str):
        assert config[fault] != 1.0
        config[fault] = 1.0
    else:
        config[fault[0]][fault[1]] = 1.0
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_stale(runner: Any, name: str) -> None:
    """Let the runner hand on the state ``name`` as it was before the call."""
    step = runner.step

    def stale(ids: Any, mask: Any, states: Any) -> Any:
        logits, new = step(ids, mask, states)
        old = states[name]
        if old.shape != new[name].shape:  # a cache must grow all the same
            old = np.concatenate([old, np.zeros_like(new[name][:, :, old.shape[2] :])], axis=2)
        return logits, {**new, name: old}

    runner.step = stale
