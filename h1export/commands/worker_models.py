"""Models that a worker process makes and times: an artifact, and transformers on the weights that it stores."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from h1export import host
from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.runtime.runner import Inspectable
from h1export.targets import Kernels
from h1export.validate.accuracy.reference import Reference
from h1export.validate.speed.gate_file import Clock
from h1export.validate.speed.regression import ModelPair
from h1export.validate.speed.worker import RunnerModel

# tokens that one timing of a gate decodes: with the artifact, and with the reference, which is slower
GATE_STEPS = 16
REFERENCE_STEPS = 4
CLOCKS: Mapping[Clock, Callable[[], float]] = {Clock.CPU: time.process_time, Clock.WALL: time.perf_counter}


def artifact_model(folder: Path, threads: int, kernels: Kernels, *, steps: int) -> RunnerModel:
    """Return the artifact in ``folder``, ready to be timed, in this process pinned to as many cores as threads."""
    host.pin(threads)
    return RunnerModel(timed_runner(Artifact.open(folder), threads, kernels), steps)


def artifact_maker(folder: Path, kernels: Kernels, steps: int) -> Callable[[int], Callable[[], RunnerModel]]:
    """Return ``Candidate.make`` of the artifact in ``folder``."""

    def make(threads: int) -> Callable[[], RunnerModel]:
        return partial(artifact_model, folder, threads, kernels, steps=steps)

    return make


def reference_model_of(
    checkpoint: Path, folder: Path, threads: int, *, kernels: Kernels, steps: int, adapters: Sequence[Path] = ()
) -> RunnerModel:
    """Return the reference on the weights of the artifact in ``folder``.

    Reading the weights counts in the peak memory of the process.
    """
    host.pin(threads)
    runner = load_runner(Artifact.open(folder), threads, kernels=kernels)
    return reference_model(checkpoint, runner, threads, steps=steps, clock=time.perf_counter, adapters=adapters)


def model_pair(
    checkpoint: Path, folder: Path, threads: int, *, kernels: Kernels, clock: Clock, adapters: Sequence[Path] = ()
) -> ModelPair:
    """Return the artifact in ``folder`` beside its reference, both for the timings of a gate."""
    host.pin(threads)
    runner = timed_runner(Artifact.open(folder), threads, kernels)
    ours = RunnerModel(runner, GATE_STEPS, CLOCKS[clock])
    reference = reference_model(
        checkpoint, runner, threads, steps=REFERENCE_STEPS, clock=CLOCKS[clock], adapters=adapters
    )
    return ModelPair(ours, reference)


def reference_model(
    checkpoint: Path,
    runner: Inspectable[Any],
    threads: int,
    *,
    steps: int,
    clock: Callable[[], float],
    adapters: Sequence[Path] = (),
) -> RunnerModel:
    """Return transformers' model on the weights that ``runner`` stores, ready to be timed."""
    torch.set_num_threads(threads)
    reference = Reference(checkpoint, adapters)
    reference.hold(runner.stored_weights())
    return RunnerModel(reference, steps, clock, chunk=reference.config.max_position_embeddings)


def timed_runner(artifact: Artifact, threads: int, kernels: Kernels) -> Inspectable[Any]:
    """Return the artifact's Runner.

    Raises:
        H1ExportError: an emulation computes the artifact on this machine, so that its speed says nothing.
    """
    runner = load_runner(artifact, threads, kernels=kernels)
    if runner.provenance.emulated:
        what = f"is computed by {runner.provenance.kernels} here: its speed says nothing"
        raise H1ExportError(artifact.folder, what, "measure it where its runtime is")
    return runner
