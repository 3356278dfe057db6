"""The Runner over a GPTQ folder: judged as every target's, with sessions that are saved and restored."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from saved_sessions import CHECKS, check_prefix_store, check_save_and_restore

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.progress import SILENT
from h1export.targets import get_target
from h1export.validate.accuracy.run import ValidateOptions, validate

Build = Callable[..., Artifact]


@pytest.mark.parametrize("name", ["norm_after_gate_two_groups", "tied", "everything"])
def test_validate_passes(name: str, make_checkpoint: Callable[..., Path], build: Build) -> None:
    checkpoint = make_checkpoint(name)
    artifact = build(checkpoint, "int4", target="gptq")
    runner = load_runner(artifact)
    options = ValidateOptions(pairs=1, quick=True)
    report = validate(artifact, runner, runner, checkpoint=checkpoint, options=options, progress=SILENT)
    assert report.passed, report.to_json()
    assert "its speed says nothing" in report.to_json()


def test_validate_passes_after_awq(spoken_checkpoint: Path, build: Build) -> None:
    """Scaled floats are stored exactly beside the integers."""
    artifact = build(spoken_checkpoint, "int4", method="awq", target="gptq", unpacked=("mlp",))
    runner = load_runner(artifact)
    options = ValidateOptions(pairs=0, quick=True)
    report = validate(artifact, runner, runner, checkpoint=spoken_checkpoint, options=options, progress=SILENT)
    assert report.passed, report.to_json()


@pytest.mark.parametrize("check", CHECKS)
def test_sessions(check: str, make_checkpoint: Callable[..., Path], build: Build) -> None:
    # PyTorch's kernels add in another order where a tensor begins at another address
    checks = {**CHECKS, "prefix_store": partial(check_prefix_store, exact=False)}
    checks[check](load_runner(build(make_checkpoint(), "int4", target="gptq")))


def test_save_and_restore(make_checkpoint: Callable[..., Path], build: Build) -> None:
    check_save_and_restore(load_runner(build(make_checkpoint(), "int4", target="gptq")), 2)


def test_last_logits(make_checkpoint: Callable[..., Path], build: Build) -> None:
    runner = load_runner(build(make_checkpoint(), "int4", target="gptq", logits="last"))
    assert not runner.limits.all_logits


def test_there_are_no_kernels_of_our_own(make_checkpoint: Callable[..., Path], build: Build) -> None:
    with pytest.raises(H1ExportError, match="leave out --kernels native"):
        load_runner(build(make_checkpoint(), "int4", target="gptq"), kernels="native")


def test_doctor_and_gate_see_the_folder(make_checkpoint: Callable[..., Path], build: Build) -> None:
    artifact = build(make_checkpoint(), "int4", target="gptq")
    target = get_target("gptq")
    findings = {finding.name: finding for finding in target.examine(artifact, build=False, progress=SILENT)}
    packed = len(artifact.manifest.weights)
    assert findings["reading"].detail == f"{packed} weights in integers"
    counts = target.operations(artifact)["tensors"]
    assert (counts["I32"], counts["F16"]) == (3 * packed, packed)
