"""Wiring of what measures speed: artifacts and their reference, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from h1export.core.artifact import Artifact
from h1export.core.progress import SILENT, Progress
from h1export.core.protocols import Runner
from h1export.errors import H1ExportError
from h1export.pipeline import check_source, load
from h1export.targets import Kernels
from h1export.validate.bench import BenchOptions, BenchReport, Contender, of_artifact
from h1export.validate.bench import bench as run_bench
from h1export.validate.players import RunnerPlayer, pin
from h1export.validate.reference import Reference
from h1export.validate.traffic import float_bytes, float_step_bytes


def bench(
    out: Path,
    against: Path | None,
    checkpoint: Path | None,
    options: BenchOptions,
    progress: Progress = SILENT,
    kernels: Kernels = "auto",
) -> BenchReport:
    """Measure the speed of the artifact ``out``, in turns with another one, or with the reference on its ``checkpoint``.

    Raises:
        H1ExportError: a damaged artifact, one that does not run here, or a checkpoint that it was not built from.
    """
    artifacts = [Artifact.open(folder) for folder in (out, against) if folder is not None]
    contenders = [of_artifact(artifact, partial(_maker, artifact.folder, kernels, options.steps)) for artifact in artifacts]
    if checkpoint is not None:
        contenders.append(_reference(artifacts[0], checkpoint, kernels, options.steps))
    return run_bench(contenders, options, progress)


def _reference(artifact: Artifact, checkpoint: Path, kernels: Kernels, steps: int) -> Contender:
    """transformers' model in float32, on the weights that ``artifact`` stores."""
    check_source(artifact, checkpoint)
    spec = artifact.spec
    held = "the artifact's, dequantised" if artifact.manifest.weights else "the checkpoint's"

    def make(threads: int) -> Callable[[], RunnerPlayer]:
        return partial(_play_reference, checkpoint, artifact.folder, threads, kernels, steps)

    return Contender(str(checkpoint), "transformers", {"weights": held}, float_bytes(spec), partial(float_step_bytes, spec), make)


def _maker(folder: Path, kernels: Kernels, steps: int, threads: int) -> Callable[[], RunnerPlayer]:
    return partial(_play, folder, threads, kernels, steps)


def _play(folder: Path, threads: int, kernels: Kernels, steps: int) -> RunnerPlayer:
    """In a process of its own: an artifact ready to be timed."""
    pin(threads)
    return RunnerPlayer(timed_runner(Artifact.open(folder), threads, kernels), steps)


def _play_reference(checkpoint: Path, folder: Path, threads: int, kernels: Kernels, steps: int) -> RunnerPlayer:
    """In a process of its own: the reference on the weights of the artifact ``folder``. Reading them counts in its peak of memory."""
    pin(threads)
    torch.set_num_threads(threads)
    reference = Reference(checkpoint)
    reference.hold(load(Artifact.open(folder), threads, kernels=kernels).stored_weights())
    return RunnerPlayer(reference, steps, chunk=reference.spec.max_position_embeddings)


def timed_runner(artifact: Artifact, threads: int, kernels: Kernels) -> Runner[Any]:
    """Raises H1ExportError for an artifact that its runtime does not run here."""
    runner = load(artifact, threads, kernels=kernels)
    if runner.capabilities.emulated:
        what = f"is computed by {runner.capabilities.kernels} here: its speed says nothing"
        raise H1ExportError(artifact.folder, what, "measure it where its runtime is")
    return runner
