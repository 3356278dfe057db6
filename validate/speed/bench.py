"""How fast a model is, at every thread count, depth and batch, and how near to the memory limit.

All configurations, of two contenders where asked, take turns round by round, so that a busy moment of the machine meets them all.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.progress import Progress
from h1export.validate.speed.memory_traffic import read_bandwidth, step_bytes
from h1export.validate.speed.statistics import Estimate, estimate, ratio
from h1export.validate.speed.worker import Kind, TimedModel, Timing, WorkerProcess

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
        kinds = (
            *((Kind.DECODE, depth) for depth in self.depths),
            *((Kind.PREFILL, length) for length in self.prefills),
        )
        return tuple(Timing(kind, tokens, batch) for kind, tokens in kinds for batch in self.batches)


@dataclass(frozen=True)
class Candidate:
    """Who is measured, and what is known before it runs.

    Attributes:
        folder: where it lies.
        target: whose format it has.
        built_as: settings that it was made with.
        weight_bytes: of its files, or of its weights where they are made while it loads.
        step_bytes: (batch, depth) -> bytes that one decode step reads.
        make: thread count -> what a Child needs to play it.
    """

    folder: str
    target: str
    built_as: Mapping[str, Any]
    weight_bytes: int
    step_bytes: Callable[[int, int], int]
    make: Callable[[int], Callable[[], TimedModel]]


@dataclass(frozen=True)
class Measured:
    """A Contender that was measured; ``peak_bytes`` by thread count, see Child.finish."""

    folder: str
    target: str
    built_as: Mapping[str, Any]
    kernels: str
    weight_bytes: int
    peak_bytes: Mapping[int, int]


@dataclass(frozen=True)
class Speed:
    """One configuration of one subject.

    Attributes:
        subject: its place in BenchReport.subjects.
        step_bytes: read by one decode step of the whole batch; None for prefill.
        bandwidth_share: of the measured bandwidth, what these bytes at this speed amount to.
        ratio: to the other subject's speed, for the first of two.
    """

    subject: int
    threads: int
    kind: Kind
    tokens: int
    batch: int
    tokens_per_second: Estimate
    step_bytes: int | None
    bandwidth_share: float | None
    ratio: Estimate | None
    samples: tuple[float, ...]

    @property
    def what(self) -> str:
        return str(Timing(self.kind, self.tokens, self.batch))


@dataclass(frozen=True)
class BenchReport:
    """Everything one run of `bench` found; ``bandwidth``: bytes a second by thread count; ``left_out``: what has no timing, and why."""

    options: BenchOptions
    machine: Mapping[str, Any]
    bandwidth: Mapping[int, Estimate]
    subjects: tuple[Measured, ...]
    speeds: tuple[Speed, ...]
    left_out: tuple[str, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def interleave(jobs: Mapping[K, Callable[[], float]], rounds: int) -> dict[K, list[float]]:
    """Run every job once a round, every second round in reverse order; what each returned, round by round."""
    samples: dict[K, list[float]] = {key: [] for key in jobs}
    for number in range(rounds):
        for key in list(jobs)[:: -1 if number % 2 else 1]:
            time.sleep(PAUSE)
            samples[key].append(jobs[key]())
    return samples


def of_artifact(artifact: Artifact, make: Callable[[int], Callable[[], TimedModel]]) -> Candidate:
    """An artifact that takes part as ``make`` plays it."""
    m = artifact.manifest
    size = sum(size for _, size in m.files.values())
    return Candidate(
        str(artifact.folder),
        m.target,
        dict(m.scheme) | dict(m.options),
        weight_bytes=size,
        step_bytes=partial(step_bytes, m, artifact.config),
        make=make,
    )


Key = tuple[int, int, Timing]  # place of the subject, threads, what


def bench(contenders: Sequence[Candidate], options: BenchOptions, progress: Progress) -> BenchReport:
    """Measure one contender, or two against each other.

    Raises:
        H1ExportError: one that does not run, or not in the memory there is; or none of the timings is possible.
    """
    progress.stage("load")
    children = {
        (i, threads): WorkerProcess(contender.make(threads))
        for i, contender in enumerate(contenders)
        for threads in options.threads
    }
    jobs, left_out = _jobs(children, contenders, options)
    memory_jobs = {threads: read_bandwidth(threads) for threads in options.threads}
    progress.stage("warm-up")
    interleave(jobs | memory_jobs, 1)
    progress.stage(f"{options.repeats} rounds")
    samples = interleave(jobs | memory_jobs, options.repeats)
    bandwidth = {threads: estimate(samples[threads]) for threads in options.threads}
    subjects = []
    for i, contender in enumerate(contenders):
        kernels = children[i, options.threads[0]].kernels
        peaks = {threads: children[i, threads].finish() for threads in options.threads}
        subjects.append(
            Measured(
                contender.folder,
                contender.target,
                contender.built_as,
                kernels=kernels,
                weight_bytes=contender.weight_bytes,
                peak_bytes=peaks,
            )
        )
    speeds = []
    for i, threads, timing in jobs:
        found = samples[i, threads, timing]
        other = samples.get((1, threads, timing))
        against = ratio(found, other) if i == 0 and other else None
        speeds.append(
            _speed(contenders[i], (i, threads, timing), found, bandwidth=bandwidth[threads].median, against=against)
        )
    return BenchReport(options, machine(), bandwidth, subjects=tuple(subjects), speeds=tuple(speeds), left_out=left_out)


def _jobs(
    children: Mapping[tuple[int, int], WorkerProcess], contenders: Sequence[Candidate], options: BenchOptions
) -> tuple[dict[Key, Callable[[], float]], tuple[str, ...]]:
    """What every child can do, and what not, with the reason."""
    jobs: dict[Key, Callable[[], float]] = {}
    left_out: dict[str, None] = {}
    for timing in options.timings:
        for (i, threads), child in children.items():
            if reason := timing.refused(child.limits, options.steps):
                left_out[f"{timing}: {contenders[i].folder} {reason}"] = None
            else:
                jobs[i, threads, timing] = partial(child.speed, timing)
    if not jobs:
        raise H1ExportError(
            "benchmark", f"nothing can be timed: {'; '.join(left_out)}", "choose smaller batches and depths"
        )
    return jobs, tuple(left_out)


def _speed(
    contender: Candidate, key: Key, samples: list[float], *, bandwidth: float, against: Estimate | None
) -> Speed:
    i, threads, timing = key
    speed = estimate(samples)
    nbytes = None
    share = None
    if timing.kind is Kind.DECODE:
        nbytes = contender.step_bytes(timing.batch, timing.tokens)
        share = nbytes * speed.median / timing.batch / bandwidth
    return Speed(
        i,
        threads,
        timing.kind,
        tokens=timing.tokens,
        batch=timing.batch,
        tokens_per_second=speed,
        step_bytes=nbytes,
        bandwidth_share=share,
        ratio=against,
        samples=tuple(samples),
    )


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}
