"""Compare several artifacts of one checkpoint: accuracy, size, shared integers and speed, whatever their runtimes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from h1export.artifact.artifact import Artifact
from h1export.commands.load import check_source, load_runner
from h1export.commands.scored_text import scored_text
from h1export.commands.worker_models import artifact_maker
from h1export.errors import H1ExportError
from h1export.progress import SILENT, Progress
from h1export.report.checks import CheckKind, Comparison
from h1export.report.report import SPEED, Report, Row
from h1export.report.stored_report import JudgedArtifact
from h1export.runtime.runner import Inspectable
from h1export.targets import Kernels
from h1export.validate.accuracy.facts import environment_facts, subject_facts
from h1export.validate.accuracy.reference import Reference
from h1export.validate.accuracy.side_by_side import Contender, side_by_side
from h1export.validate.accuracy.text_rows import NOT_REQUESTED
from h1export.validate.accuracy.tolerances import tolerances_of
from h1export.validate.speed.bench import BenchOptions, BenchReport, bench, candidate_of


def compare_artifacts(
    outs: Sequence[Path],
    checkpoint: Path,
    *,
    text: Path | None = None,
    text_bytes: int = 0,
    speed: BenchOptions | None = None,
    kernels: Kernels = "auto",
    adapters: Sequence[Path] = (),
    quick: bool = False,
    progress: Progress = SILENT,
) -> list[JudgedArtifact]:
    """Return the artifacts in ``outs``, in order, each with a report of its own; nothing is written.

    All artifacts are loaded at once, and speeds are measured in turns, each in a process of its own.

    Args:
        outs: the artifacts' folders.
        checkpoint: the folder of the checkpoint that they were built from.
        text: as in ``scored_text``, in the tokens of the first artifact.
        text_bytes: the number of bytes of the text that are scored; 0 means all.
        speed: what to time, for one thread count; None means that speed is not measured.
        kernels: as in ``targets.loading.Load``.
        adapters: folders of the adapters that they were built with, in order.
        quick: whether to run only the few cases that are ``quick``, and no text.
        progress: shows the stages.

    Raises:
        H1ExportError: fewer than two artifacts, a damaged one, one that does not run here, or one of another
            checkpoint.
    """
    if len(outs) < 2:
        raise H1ExportError("compare", f"got {len(outs)} artifacts", "give two or more")
    threads = speed.threads[0] if speed else 0
    progress.stage("hashes")
    artifacts = [Artifact.open(out) for out in outs]
    for artifact in artifacts:
        artifact.check_hashes()
        check_source(artifact, checkpoint, adapters)
    if threads:
        torch.set_num_threads(threads)
    progress.stage("load")
    runners = [load_runner(artifact, threads, kernels=kernels) for artifact in artifacts]
    rows = side_by_side(
        [_contender(artifact, runner) for artifact, runner in zip(artifacts, runners, strict=True)],
        Reference(checkpoint, adapters),
        NOT_REQUESTED if quick else scored_text(outs[0], text, text_bytes),
        quick=quick,
        progress=progress,
    )
    subjects = [subject_facts(artifact.manifest, runner) for artifact, runner in zip(artifacts, runners, strict=True)]
    emulated = [runner.provenance.kernels if runner.provenance.emulated else "" for runner in runners]
    del runners  # the processes that are timed need the memory
    speeds = _speed_rows(artifacts, emulated, speed, kernels=kernels, progress=progress)
    environment = environment_facts()
    return [
        JudgedArtifact(artifact, Report(subject, environment, (*accuracy, *timed)))
        for artifact, subject, accuracy, timed in zip(artifacts, subjects, rows, speeds, strict=True)
    ]


def _contender(artifact: Artifact, runner: Inspectable[Any]) -> Contender:
    float32 = runner.provenance.float32
    return Contender(runner, tolerances_of(artifact.manifest, float32, float32, chosen={}))


def _speed_rows(
    artifacts: Sequence[Artifact],
    emulated: Sequence[str],
    options: BenchOptions | None,
    *,
    kernels: Kernels,
    progress: Progress,
) -> list[list[Row]]:
    """Return the rows about the speed of each artifact; ``emulated`` names what emulates its runtime, or is empty."""
    if options is None:
        return [[] for _ in artifacts]
    timed = [place for place, emulation in enumerate(emulated) if not emulation]
    candidates = [
        candidate_of(artifacts[place], artifact_maker(artifacts[place].folder, kernels, options.steps))
        for place in timed
    ]
    report = bench(candidates, options, progress) if candidates else None
    return [
        _measured(report, timed.index(place))
        if report and not emulation
        else [Row(CheckKind.SPEED, Comparison.ALONE, note=f"computed by {emulation}: its speed says nothing")]
        for place, emulation in enumerate(emulated)
    ]


def _measured(report: BenchReport, model: int) -> list[Row]:
    return [
        Row(
            CheckKind.SPEED,
            Comparison.ALONE,
            phase=speed.phase,
            length=speed.tokens,
            figures={
                SPEED: speed.tokens_per_second.median,
                "low": speed.tokens_per_second.low,
                "high": speed.tokens_per_second.high,
            },
            note=f"median of {len(speed.samples)} interleaved rounds, threads {speed.threads}",
        )
        for speed in report.speeds
        if speed.model == model
    ]
