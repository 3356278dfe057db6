"""`h1export compare`: the figures are those of `validate`, and the integers are counted tensor by tensor."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from h1export import cli
from h1export.artifact.artifact import Artifact
from h1export.commands import compare
from h1export.commands.compare import compare_artifacts
from h1export.commands.load import load_runner
from h1export.commands.scored_text import scored_text
from h1export.commands.validate import validate_artifact
from h1export.errors import H1ExportError
from h1export.progress import Progress
from h1export.report.checks import CheckKind, Comparison, Phase
from h1export.report.report import AS_FIRST, SPEED, TENSORS
from h1export.targets import Kernels
from h1export.validate.accuracy.reference import Reference
from h1export.validate.accuracy.text_rows import text_rows
from h1export.validate.accuracy.tolerances import TEXT_METRIC
from h1export.validate.speed.bench import BenchOptions, BenchReport, Candidate, Speed
from h1export.validate.speed.statistics import Estimate

pytestmark = pytest.mark.ort
Build = Callable[..., Artifact]


class Emulated:
    """A Runner that says that it emulates its runtime."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.provenance = replace(runner.provenance, emulated=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


def speed_of(model: int, phase: Phase) -> Speed:
    """Return a made-up speed of 100 tokens a second and ``model`` more."""
    made = Estimate(100.0 + model, 90.0, 110.0)
    return Speed(
        model,
        1,
        phase,
        tokens=7,
        batch=1,
        tokens_per_second=made,
        step_bytes=None,
        bandwidth_share=None,
        ratio=None,
        samples=(1.0,),
    )


ACCURACY = {CheckKind.CASE, CheckKind.TEXT}


def test_figures_are_those_of_validate(spoken_checkpoint: Path, build: Build) -> None:
    artifacts = [
        build(spoken_checkpoint, "int4"),
        build(spoken_checkpoint, "none"),
        build(spoken_checkpoint, "int4", graph="portable"),
    ]
    found = compare_artifacts([artifact.folder for artifact in artifacts], spoken_checkpoint, quick=True)
    for artifact, subject in zip(artifacts, found, strict=True):
        alone = validate_artifact(artifact.folder, spoken_checkpoint, {}, quick=True, save=False)
        expected = [row for row in alone.rows if row.kind in ACCURACY and row.comparison is Comparison.SOURCE]
        assert [row for row in subject.rows if row.kind in ACCURACY] == expected
        assert subject.report.subject == alone.subject
    counted = [one.rows[-1].figures for one in found]
    tensors = counted[0][TENSORS]
    assert tensors > 8
    assert counted == [
        {TENSORS: tensors, "as in 2": 0.0, "as in 3": tensors},
        {TENSORS: 0.0, AS_FIRST: 0.0, "as in 3": 0.0},
        {TENSORS: tensors, AS_FIRST: tensors, "as in 2": 0.0},
    ]


def test_a_text_is_scored_as_if_alone(spoken_checkpoint: Path, build: Build, earlier_build: Build) -> None:
    runners = [load_runner(build(spoken_checkpoint, quant)) for quant in ("int4", "none")]
    short = load_runner(earlier_build(spoken_checkpoint))
    text = scored_text(build(spoken_checkpoint).folder, None, 700)
    reference = Reference(spoken_checkpoint)
    limits = [{TEXT_METRIC: 1.5}, {TEXT_METRIC: 1.1}]
    first, second, third = text_rows(
        [runners[0], short, runners[1]], reference, text, tolerances=[limits[0], {}, limits[1]]
    )
    alone = [
        text_rows([one], reference, text, tolerances=[limit])[0] for one, limit in zip(runners, limits, strict=True)
    ]
    assert [first, third] == alone
    assert second.note == "the artifact gives the last position's logits only"


def test_other_integers_are_not_shared(spoken_checkpoint: Path, build: Build) -> None:
    outs = [build(spoken_checkpoint, "int4", group_size=size).folder for size in (32, 64)]
    found = compare_artifacts(outs, spoken_checkpoint, quick=True)
    figures = found[1].rows[-1].figures
    assert figures[AS_FIRST] < figures[TENSORS] // 4  # the embedding is in int8, in rows
    assert {row.note for row in found[0].rows if row.kind is CheckKind.TEXT} == {"not requested"}


def test_only_a_runtime_that_is_not_emulated_is_timed(
    spoken_checkpoint: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The speeds of two of three artifacts, which a made-up benchmark returns, are in the reports of these two."""
    options = BenchOptions((7,), (16,), (1,))
    outs = [build(spoken_checkpoint, quant).folder for quant in ("int4", "none")]

    def timed(candidates: Sequence[Candidate], asked: BenchOptions, progress: Progress) -> BenchReport:
        assert asked is options
        assert [candidate.folder for candidate in candidates] == [str(outs[0]), str(outs[0])]
        for candidate in candidates:
            pickle.dumps(candidate.make(1))  # goes to another process
        speeds = [speed_of(model, phase) for phase in Phase for model in (0, 1)]
        return BenchReport(asked, {}, {}, measured=(), speeds=tuple(speeds), left_out=())

    def load(artifact: Artifact, threads: int, *, kernels: Kernels) -> Any:
        runner = load_runner(artifact, threads, kernels=kernels)
        return Emulated(runner) if artifact.folder == outs[1] else runner

    monkeypatch.setattr(compare, "bench", timed)
    monkeypatch.setattr(compare, "load_runner", load)
    found = compare_artifacts([outs[0], outs[1], outs[0]], spoken_checkpoint, quick=True, speed=options)
    speeds = [[row for row in one.rows if row.kind is CheckKind.SPEED] for one in found]
    for model, rows in enumerate((speeds[0], speeds[2])):
        assert [(row.phase, row.figures[SPEED]) for row in rows] == [(phase, 100.0 + model) for phase in Phase]
    assert [row.figures for row in speeds[1]] == [{}]
    assert "its speed says nothing" in speeds[1][0].note


def test_the_command(spoken_checkpoint: Path, build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outs = [str(build(spoken_checkpoint, quant).folder) for quant in ("int4", "none")]
    page = tmp_path / "page.html"
    words = ["compare", *outs, "--model", str(spoken_checkpoint), "--quick", "--repeats", "0", "--to", str(page)]
    assert cli.run([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [one["artifact"] for one in answer["artifacts"]] == outs
    assert all(one["passed"] for one in answer["artifacts"])
    assert "of them as in the first" in page.read_text(encoding="utf-8")
    assert cli.run(words) == 0
    table = capsys.readouterr().err
    assert all(out in table for out in outs)
    assert "1, bits per byte: not requested" in table


def test_what_cannot_be_compared(spoken_checkpoint: Path, make_checkpoint: Callable[..., Path], build: Build) -> None:
    out = build(spoken_checkpoint).folder
    with pytest.raises(H1ExportError, match="got 1 artifacts; give two or more"):
        compare_artifacts([out], spoken_checkpoint)
    other = build(make_checkpoint(seed=1)).folder
    with pytest.raises(H1ExportError, match="was not built from"):
        compare_artifacts([out, other], spoken_checkpoint)
