"""Measure the speed and memory of artifacts, and of their reference, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from h1export.artifact.artifact import Artifact
from h1export.commands.load import check_source, read_options
from h1export.commands.worker_models import artifact_maker, reference_model_of
from h1export.progress import SILENT, Progress
from h1export.targets import Kernels
from h1export.validate.speed.bench import BenchOptions, BenchReport, Candidate, bench, candidate_of
from h1export.validate.speed.memory_traffic import float_bytes, float_step_bytes
from h1export.validate.speed.worker import RunnerModel


def bench_artifact(
    out: Path,
    against: Path | None,
    checkpoint: Path | None,
    *,
    options: BenchOptions,
    progress: Progress = SILENT,
    kernels: Kernels = "auto",
    adapters: Sequence[Path] = (),
) -> BenchReport:
    """Measure the artifact ``out``, in turns with the artifact ``against`` or with the reference on ``checkpoint``.

    ``adapters`` are the folders of the adapters that ``out`` was built with; the reference has them merged.

    Raises:
        H1ExportError: a damaged artifact, one that does not run here, or a checkpoint that it was not built from.
    """
    artifacts = [Artifact.open(folder) for folder in (out, against) if folder is not None]
    for artifact in artifacts:
        read_options(artifact)  # raises for wrong options before a worker process starts
    candidates = [
        candidate_of(artifact, artifact_maker(artifact.folder, kernels, options.steps)) for artifact in artifacts
    ]
    if checkpoint is not None:
        candidates.append(_reference(artifacts[0], checkpoint, kernels, steps=options.steps, adapters=adapters))
    return bench(candidates, options, progress)


def _reference(
    artifact: Artifact, checkpoint: Path, kernels: Kernels, *, steps: int, adapters: Sequence[Path]
) -> Candidate:
    """Return the Candidate of transformers' model in float32, on the weights that ``artifact`` stores."""
    check_source(artifact, checkpoint, adapters)
    config = artifact.config
    weights = "the artifact's, dequantised" if artifact.manifest.weights else "the checkpoint's"

    def make(threads: int) -> Callable[[], RunnerModel]:
        return partial(
            reference_model_of, checkpoint, artifact.folder, threads, kernels=kernels, steps=steps, adapters=adapters
        )

    return Candidate(
        str(checkpoint),
        "transformers",
        {"weights": weights},
        weight_bytes=float_bytes(config),
        step_bytes=partial(float_step_bytes, config),
        make=make,
    )
