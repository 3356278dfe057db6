"""Measure how fast a model is at every thread count, depth and batch, and its share of the memory bandwidth.

All configurations, those of two candidates too, take turns round by round, so that a busy moment of the machine affects
them all.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

from h1export import host
from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.progress import Progress
from h1export.report.checks import Phase
from h1export.validate.speed.memory_traffic import Bandwidth, Turn, step_bytes
from h1export.validate.speed.statistics import Estimate, estimate, ratio
from h1export.validate.speed.worker import TimedModel, Timing, WorkerProcess

PAUSE = 0.05  # seconds between two timings: threads of a runtime may spin on for a while

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        depths: tokens before those that are decoded.
        prefills: tokens of prompts.
        threads: thread counts.
        batches: sequences at a time.
        repeats: rounds that count, after one that does not.
        steps: tokens a sequence decodes in one timing.
    """

    depths: tuple[int, ...] = (0, 2048)
    prefills: tuple[int, ...] = (512,)
    threads: tuple[int, ...] = (os.cpu_count() or 1,)
    batches: tuple[int, ...] = (1,)
    repeats: int = 5
    steps: int = 32

    @property
    def timings(self) -> tuple[Timing, ...]:
        wanted = (
            *((Phase.DECODE, depth) for depth in self.depths),
            *((Phase.PREFILL, length) for length in self.prefills),
        )
        return tuple(Timing(phase, tokens, batch) for phase, tokens in wanted for batch in self.batches)


@dataclass(frozen=True)
class Candidate:
    """A model that will be measured, and what is known of it before it runs.

    Attributes:
        folder: the artifact or checkpoint.
        target: the target whose format it has.
        built_as: the settings that it was built with.
        weight_bytes: bytes of its files, or of its weights where they are computed while it loads.
        step_bytes: (batch, depth) -> bytes that one decode step reads.
        make: thread count -> the function with which a WorkerProcess makes the model.
    """

    folder: str
    target: str
    built_as: Mapping[str, Any]
    weight_bytes: int
    step_bytes: Callable[[int, int], int]
    make: Callable[[int], Callable[[], TimedModel]]


@dataclass(frozen=True)
class Measured:
    """A Candidate that was measured; ``peak_bytes`` by thread count, see WorkerProcess.finish."""

    folder: str
    target: str
    built_as: Mapping[str, Any]
    kernels: str
    weight_bytes: int
    peak_bytes: Mapping[int, int]


@dataclass(frozen=True)
class Speed:
    """The speed of one measured model in one configuration.

    Attributes:
        model: its place in BenchReport.measured.
        threads: thread count.
        phase: prefill or decode.
        tokens: of the prompt, or before those that are decoded.
        batch: sequences at a time.
        tokens_per_second: those of all sequences of the batch together.
        step_bytes: bytes that one decode step of the whole batch reads; None for prefill.
        bandwidth_share: the bandwidth that these bytes take at this speed, as a share of the best one, at most 1; None
            for prefill.
        ratio: this speed by that of the other model, for the first of two.
        samples: tokens per second of each round.
    """

    model: int
    threads: int
    phase: Phase
    tokens: int
    batch: int
    tokens_per_second: Estimate
    step_bytes: int | None
    bandwidth_share: float | None
    ratio: Estimate | None
    samples: tuple[float, ...]

    @property
    def timing(self) -> Timing:
        return Timing(self.phase, self.tokens, self.batch)


@dataclass(frozen=True)
class BenchReport:
    """The result of one run of `bench`.

    Attributes:
        options: what was to be measured.
        machine: see host.machine_facts.
        bandwidth: thread count -> how fast memory was read.
        measured: the models, one or two.
        speeds: one for each model and configuration.
        left_out: the timings that were not possible, each with the reason.
    """

    options: BenchOptions
    machine: Mapping[str, Any]
    bandwidth: Mapping[int, Bandwidth]
    measured: tuple[Measured, ...]
    speeds: tuple[Speed, ...]
    left_out: tuple[str, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def interleave(jobs: Mapping[K, Callable[[], float]], rounds: int) -> dict[K, list[float]]:
    """Run every job once a round, every second round in reverse order; return the results of each, round by round."""
    samples: dict[K, list[float]] = {key: [] for key in jobs}
    for number in range(rounds):
        for key in list(jobs)[:: -1 if number % 2 else 1]:
            time.sleep(PAUSE)
            samples[key].append(jobs[key]())
    return samples


def candidate_of(artifact: Artifact, make: Callable[[int], Callable[[], TimedModel]]) -> Candidate:
    """Return the Candidate of an artifact; ``make`` is that of Candidate."""
    manifest = artifact.manifest
    size = sum(size for _, size in manifest.files.values())
    return Candidate(
        str(artifact.folder),
        manifest.target,
        dict(manifest.scheme) | dict(manifest.options),
        weight_bytes=size,
        step_bytes=partial(step_bytes, manifest, artifact.config),
        make=make,
    )


Key = tuple[int, int, Timing]  # place of the candidate, threads, timing


def bench(candidates: Sequence[Candidate], options: BenchOptions, progress: Progress) -> BenchReport:
    """Measure one candidate, or two against each other.

    Raises:
        H1ExportError: a candidate does not run, or lacks memory; or none of the timings is possible.
    """
    progress.stage("load")
    workers = {
        (i, threads): WorkerProcess(candidate.make(threads))
        for i, candidate in enumerate(candidates)
        for threads in options.threads
    }
    jobs, left_out = _jobs(workers, candidates, options)
    turns = {threads: Turn(threads) for threads in options.threads}
    progress.stage("warm-up")
    interleave(jobs | turns, 1)
    progress.stage(f"{options.repeats} rounds")
    samples = interleave(jobs | turns, options.repeats)
    decoded: dict[int, list[float]] = {threads: [] for threads in options.threads}
    for i, threads, timing in jobs:
        if timing.phase is Phase.DECODE:
            nbytes = candidates[i].step_bytes(timing.batch, timing.tokens)
            decoded[threads] += [nbytes * speed / timing.batch for speed in samples[i, threads, timing]]
    bandwidth = {threads: Bandwidth.of(turn.reads, decoded[threads]) for threads, turn in turns.items()}
    measured = []
    for i, candidate in enumerate(candidates):
        kernels = workers[i, options.threads[0]].kernels
        peaks = {threads: workers[i, threads].finish() for threads in options.threads}
        measured.append(
            Measured(
                candidate.folder,
                candidate.target,
                candidate.built_as,
                kernels=kernels,
                weight_bytes=candidate.weight_bytes,
                peak_bytes=peaks,
            )
        )
    speeds = []
    for i, threads, timing in jobs:
        found = samples[i, threads, timing]
        other = samples.get((1, threads, timing))
        against = ratio(found, other) if i == 0 and other else None
        speeds.append(
            _speed(candidates[i], (i, threads, timing), found, bandwidth=bandwidth[threads].best, against=against)
        )
    return BenchReport(
        options,
        host.machine_facts(),
        bandwidth,
        measured=tuple(measured),
        speeds=tuple(speeds),
        left_out=left_out,
    )


def _jobs(
    workers: Mapping[tuple[int, int], WorkerProcess], candidates: Sequence[Candidate], options: BenchOptions
) -> tuple[dict[Key, Callable[[], float]], tuple[str, ...]]:
    """Return the timings that each worker can do, and those that it cannot, with the reason."""
    jobs: dict[Key, Callable[[], float]] = {}
    left_out: dict[str, None] = {}
    for timing in options.timings:
        for (i, threads), worker in workers.items():
            if reason := timing.refused(worker.limits, options.steps):
                left_out[f"{timing.key}: {candidates[i].folder} {reason}"] = None
            else:
                jobs[i, threads, timing] = partial(worker.speed, timing)
    if not jobs:
        raise H1ExportError(
            "benchmark", f"nothing can be timed: {'; '.join(left_out)}", "choose smaller batches and depths"
        )
    return jobs, tuple(left_out)


def _speed(
    candidate: Candidate, key: Key, samples: list[float], *, bandwidth: float, against: Estimate | None
) -> Speed:
    i, threads, timing = key
    speed = estimate(samples)
    nbytes = None
    share = None
    if timing.phase is Phase.DECODE:
        nbytes = candidate.step_bytes(timing.batch, timing.tokens)
        share = nbytes * speed.median / timing.batch / bandwidth
    return Speed(
        i,
        threads,
        timing.phase,
        tokens=timing.tokens,
        batch=timing.batch,
        tokens_per_second=speed,
        step_bytes=nbytes,
        bandwidth_share=share,
        ratio=against,
        samples=tuple(samples),
    )
