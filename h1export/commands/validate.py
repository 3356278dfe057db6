"""Compare an artifact with the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from h1export.artifact.artifact import REPORT, Artifact
from h1export.commands.load import check_source, load_runner
from h1export.commands.scored_text import scored_text
from h1export.progress import SILENT, Progress
from h1export.report.report import Report
from h1export.targets import Kernels
from h1export.validate.accuracy.run import ValidateOptions
from h1export.validate.accuracy.run import validate as run_validation
from h1export.validate.accuracy.text_rows import NOT_REQUESTED
from h1export.writing import write_into


def validate_artifact(
    out: Path,
    checkpoint: Path,
    tolerances: Mapping[str, float],
    *,
    text: Path | None = None,
    text_bytes: int = 0,
    latency_pairs: int = 7,
    threads: int = 0,
    progress: Progress = SILENT,
    kernels: Kernels = "auto",
    bisect: bool = False,
    prompts: int = 8,
    contexts: Sequence[int] = (),
    adapters: Sequence[Path] = (),
    quick: bool = False,
    save: bool = True,
) -> Report:
    """Compare the artifact ``out`` with the reference on ``checkpoint`` and write ``out/report.json``.

    Args:
        out: the artifact's folder.
        checkpoint: the folder of the checkpoint that it was built from.
        tolerances: metric -> tolerance, overriding the defaults.
        text: the text for bits per byte; None means the held-out text that ships with the embedded model.
        text_bytes: the number of bytes of the text that are scored; 0 means all.
        latency_pairs: the number of paired latency runs; 0 means that latency is not measured.
        threads: the number of threads of artifact and reference; 0 leaves it to them.
        progress: shows the stages.
        kernels: as in ``targets.loading.Load``.
        bisect, prompts, contexts: as in ValidateOptions.
        adapters: folders of the adapters that it was built with, in order.
        quick: whether to run only the few cases that are ``quick``, with no text, greedy texts or latency, whatever
            the other arguments say.
        save: whether to write the report.

    Raises:
        H1ExportError: a damaged artifact, or a checkpoint that is not the one it was built from.
    """
    artifact = Artifact.open(out)
    progress.stage("hashes")
    artifact.check_hashes()
    check_source(artifact, checkpoint, adapters)
    if threads:
        torch.set_num_threads(threads)
    options = ValidateOptions(
        tolerances,
        NOT_REQUESTED if quick else scored_text(out, text, text_bytes),
        pairs=0 if quick else latency_pairs,
        bisect=bisect,
        prompts=0 if quick else prompts,
        contexts=tuple(contexts),
        quick=quick,
        adapters=tuple(adapters),
    )
    runner = load_runner(artifact, threads, kernels=kernels)
    exact = runner if runner.provenance.float32 else load_runner(artifact, threads, float32=True, kernels=kernels)
    if not exact.provenance.float32:  # the runtime has no float32 form of it
        exact = runner
    report = run_validation(artifact, runner, exact, checkpoint=checkpoint, options=options, progress=progress)
    if save:
        write_into(out, REPORT, report.to_json().encode())
    return report
