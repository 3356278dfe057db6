"""How fast an artifact is, at every thread count and depth, and how near to the memory limit.

All configurations, and two artifacts where asked, take turns round by round, so that a busy moment of the machine meets them all.
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

from h1export.core.artifact import Artifact
from h1export.core.progress import Progress
from h1export.validate.players import Child, Kind, Player, Timing
from h1export.validate.statistics import Estimate, estimate, ratio
from h1export.validate.traffic import read_bandwidth, step_bytes

PAUSE = 0.05  # seconds between two timings: threads of a runtime may spin on for a while

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        depths: tokens before those that are decoded.
        prefills: tokens of prompts.
        threads: thread counts.
        batch: sequences at a time.
        repeats: rounds that count, after one that does not.
        steps: tokens a sequence decodes in one timing.
    """

    depths: tuple[int, ...] = (0, 2048)
    prefills: tuple[int, ...] = (512,)
    threads: tuple[int, ...] = (os.cpu_count() or 1,)
    batch: int = 1
    repeats: int = 5
    steps: int = 32

    @property
    def timings(self) -> tuple[Timing, ...]:
        return (*(Timing(Kind.DECODE, depth) for depth in self.depths), *(Timing(Kind.PREFILL, length) for length in self.prefills))


@dataclass(frozen=True)
class Subject:
    """One artifact that was measured; ``peak_bytes`` by thread count, see Child.finish."""

    folder: str
    target: str
    scheme: dict[str, Any]
    options: dict[str, Any]
    kernels: str
    file_bytes: int
    peak_bytes: Mapping[int, int]


@dataclass(frozen=True)
class Speed:
    """One configuration of one artifact.

    Attributes:
        subject: its place in BenchReport.subjects.
        step_bytes: read by one decode step of the whole batch, see traffic.step_bytes; None for prefill.
        bandwidth_share: of the measured bandwidth, what these bytes at this speed amount to.
        ratio: to the other artifact's speed, for the first of two.
    """

    subject: int
    threads: int
    kind: Kind
    tokens: int
    tokens_per_second: Estimate
    step_bytes: int | None
    bandwidth_share: float | None
    ratio: Estimate | None
    samples: tuple[float, ...]


@dataclass(frozen=True)
class BenchReport:
    """Everything one run of `bench` found; ``bandwidth``: bytes a second by thread count."""

    options: BenchOptions
    machine: Mapping[str, Any]
    bandwidth: Mapping[int, Estimate]
    subjects: tuple[Subject, ...]
    speeds: tuple[Speed, ...]

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


Make = Callable[[Artifact, int], Callable[[], Player]]


def bench(artifacts: Sequence[Artifact], make: Make, options: BenchOptions, progress: Progress) -> BenchReport:
    """Measure one artifact, or two against each other; ``make`` gives what a Child needs to play an artifact at a thread count.

    Raises:
        H1ExportError: an artifact that does not run, or not in the memory there is.
    """
    progress.stage("load")
    children = {(i, threads): Child(make(artifact, threads)) for i, artifact in enumerate(artifacts) for threads in options.threads}
    jobs: dict[tuple[int, int, Timing], Callable[[], float]] = {
        (i, threads, timing): partial(child.speed, timing) for timing in options.timings for (i, threads), child in children.items()
    }
    memory_jobs = {threads: read_bandwidth(threads) for threads in options.threads}
    progress.stage("warm-up")
    interleave(jobs | memory_jobs, 1)
    progress.stage(f"{options.repeats} rounds")
    samples = interleave(jobs | memory_jobs, options.repeats)
    bandwidth = {threads: estimate(samples[threads]) for threads in options.threads}
    subjects = []
    for i, artifact in enumerate(artifacts):
        kernels = children[i, options.threads[0]].kernels
        peaks = {threads: children[i, threads].finish() for threads in options.threads}
        subjects.append(_subject(artifact, kernels, peaks))
    speeds = []
    for i, threads, timing in jobs:
        found = samples[i, threads, timing]
        against = ratio(found, samples[1, threads, timing]) if i == 0 and len(artifacts) == 2 else None
        speeds.append(_speed(artifacts, i, threads, timing, found, bandwidth[threads].median, options.batch, against))
    return BenchReport(options, machine(), bandwidth, tuple(subjects), tuple(speeds))


def _subject(artifact: Artifact, kernels: str, peaks: Mapping[int, int]) -> Subject:
    m = artifact.manifest
    size = sum(size for _, size in m.files.values())
    return Subject(str(artifact.folder), m.target, dict(m.scheme), dict(m.options), kernels, size, peaks)


def _speed(
    artifacts: Sequence[Artifact],
    index: int,
    threads: int,
    timing: Timing,
    samples: list[float],
    bandwidth: float,
    batch: int,
    against: Estimate | None,
) -> Speed:
    speed, nbytes, share = estimate(samples), None, None
    if timing.kind is Kind.DECODE:
        nbytes = step_bytes(artifacts[index].manifest, artifacts[index].spec, batch, timing.tokens)
        share = nbytes * speed.median / batch / bandwidth
    return Speed(index, threads, timing.kind, timing.tokens, speed, nbytes, share, against, tuple(samples))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}
