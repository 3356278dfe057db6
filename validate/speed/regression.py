"""Whether an artifact got larger, hungrier or slower than its baseline says it was."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.report.report import Verdict
from h1export.validate.speed.decision import decide_all, median_interval
from h1export.validate.speed.gate_file import Baseline, Gate, Limit, Ratio, model_of
from h1export.validate.speed.memory_traffic import step_bytes
from h1export.validate.speed.statistics import CONFIDENCE
from h1export.validate.speed.worker import Kind, TimedModel, Timing, WorkerProcess

BEST_OF = 3  # timings of each side in a pair, of which the fastest counts: what disturbs one only ever adds to it
PROCESSES = 3  # that a baseline is measured in: memory lies differently in each
WRITE = "run h1export gate with --write-baseline and commit the file, if the change is meant"
FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "asimddp",
    "i8mm",
    "sve",
)  # what int8 and float32 kernels choose by


@dataclass(frozen=True)
class Check:
    """One figure and its limit; ``low`` and ``high``: what the figure may be, where it was measured and not counted."""

    name: str
    verdict: Verdict
    figure: float | None = None
    limit: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class GateReport:
    """Every check of one artifact."""

    artifact: str
    gate: Gate
    machine: Mapping[str, Any]
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Verdict:
        """FAIL before INCONCLUSIVE before PASS."""
        found = {check.verdict for check in self.checks}
        return next((verdict for verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE) if verdict in found), Verdict.PASS)

    def to_json(self) -> str:
        return json.dumps({"verdict": self.verdict, **asdict(self)}, indent=1, allow_nan=False) + "\n"


def cpu_kind(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The instruction set, as far as kernels differ by it: within one kind ratios of two programs hold from machine to machine."""
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    have = set(lines[0].split()) if lines else set()
    return " ".join([platform.machine(), *(flag for flag in FLAGS if flag in have)])


class ModelPair:
    """Two players in one process, timed side by side in random order."""

    def __init__(self, ours: TimedModel, theirs: TimedModel) -> None:
        self.limits = ours.limits
        self.provenance = ours.provenance
        self._players = (ours, theirs)
        self._random = np.random.default_rng()

    def speed(self, timing: Timing) -> float:
        """The speed of the first in that of the second, each the best of BEST_OF."""
        found = [0.0, 0.0]
        for i in self._random.permutation(2):
            found[i] = max(self._players[i].speed(timing) for _ in range(BEST_OF))
        return found[0] / found[1]


@dataclass(frozen=True)
class Makers:
    """What processes are started with: both sides of each timing, and the artifact alone, whose memory counts.

    ``steps``: of a timing. ``kind``: of the machine, as ratios are kept by.
    """

    pair: Callable[[], TimedModel]
    alone: Callable[[], TimedModel]
    steps: int
    kind: str = field(default_factory=cpu_kind)


def counted(artifact: Artifact, gate: Gate, operations: Mapping[str, Mapping[str, int]]) -> Baseline:
    """The figures that no clock is needed for."""
    decoded = [limit.timing for limit in gate.timings if limit.timing.kind is Kind.DECODE]
    steps = {
        str(timing): step_bytes(artifact.manifest, artifact.config, timing.batch, depth=timing.tokens)
        for timing in decoded
    }
    files = {name: size for name, (_, size) in artifact.manifest.files.items()}
    spills = {name: kernel["spilled"] for name, kernel in artifact.manifest.requirements.get("kernels", {}).items()}
    return Baseline(model_of(artifact.manifest), operations, files, step_bytes=steps, spills=spills)


def counted_checks(now: Baseline, then: Baseline, gate: Gate) -> Iterator[Check]:
    """Nodes, files, bytes read a step and spills, each against the baseline."""
    if now.model != then.model:
        raise H1ExportError("baseline", "is of another model, or of other build options", WRITE)
    for graph in dict.fromkeys((*now.nodes, *then.nodes)):
        yield _within(f"nodes {graph}", now.nodes.get(graph, {}), then.nodes.get(graph, {}), gate.nodes)
    yield _within("file bytes", now.files, then.files, gate.bytes)
    if now.step_bytes:
        _in_baseline(now.step_bytes, then.step_bytes)
        yield _within("bytes a step reads", now.step_bytes, then.step_bytes, gate.step_bytes)
    if now.spills:
        yield _within("kernel spills", now.spills, then.spills, 1.0)


def _within(name: str, now: Mapping[str, int], then: Mapping[str, int], factor: float) -> Check:
    """The total, and as a note whatever is beyond its own limit, or less than it was."""
    beyond = [
        f"{key} {now[key]}, was {then.get(key, 0)}" for key in sorted(now) if now[key] > factor * then.get(key, 0)
    ]
    less = [f"{key} {now.get(key, 0)}, was {then[key]}" for key in sorted(then) if now.get(key, 0) < then[key]]
    note = "; ".join(beyond) or ("less than the baseline: " + "; ".join(less) if less else "")
    return Check(
        name, Verdict.FAIL if beyond else Verdict.PASS, sum(now.values()), limit=factor * sum(then.values()), note=note
    )


def _in_baseline(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    if missing := [name for name in wanted if name not in found]:
        raise H1ExportError("baseline", f"has no figure for {', '.join(missing)}", WRITE)


def memory_of(makers: Makers, gate: Gate) -> int:
    """Bytes at the peak of a process that does each timing once, beyond what it held before it loaded the artifact."""
    child = WorkerProcess(makers.alone)
    for limit in _possible(gate, child, makers.steps):
        child.speed(limit.timing)
    return child.finish()


def _possible(gate: Gate, child: WorkerProcess, steps: int) -> tuple[Limit, ...]:
    for limit in gate.timings:
        if reason := limit.timing.refused(child.limits, steps):
            raise H1ExportError(
                "gate", f"{limit.timing}: the artifact {reason}", "choose another timing in the gates' file"
            )
    return gate.timings


def measured_checks(makers: Makers, then: Baseline, gate: Gate) -> Iterator[Check]:
    """Memory and every timing against the baseline.

    Raises:
        H1ExportError: no baseline for a timing, or a timing that the artifact has no room for.
    """
    if then.peak_bytes:
        peak = memory_of(makers, gate)
        limit = gate.memory * then.peak_bytes
        yield Check("peak memory", Verdict.FAIL if peak > limit else Verdict.PASS, peak, limit=limit)
    kind = makers.kind
    names = [str(limit.timing) for limit in gate.timings]
    if not names:
        return
    if kind not in then.ratios:
        what = f"the baseline is of {' and '.join(then.ratios) or 'no machine'}, and this one is {kind}"
        settle = f"{what}: run h1export gate --write-baseline here, which keeps the others"
        yield from (Check(name, Verdict.INCONCLUSIVE, note=settle) for name in names)
        return
    ratios = then.ratios[kind]
    _in_baseline(dict.fromkeys(names), ratios)
    child = WorkerProcess(makers.pair)
    limits = {limit.timing: limit.slowdown for limit in _possible(gate, child, makers.steps)}
    for timing in limits:
        child.speed(timing)  # warm-up
    found = decide_all(lambda timing: 1 / child.speed(timing) / ratios[str(timing)].estimate.median, limits, gate.pairs)
    child.finish()
    for timing, decision in found.items():
        e = decision.estimate
        note = decision.settle or f"{decision.pairs} pairs"
        yield Check(str(timing), decision.verdict, e.median, limit=decision.limit, low=e.low, high=e.high, note=note)


def measured(makers: Makers, now: Baseline, gate: Gate) -> Baseline:
    """``now`` with its memory and ratios on this kind of machine, from PROCESSES processes."""
    samples: dict[Timing, list[float]] = {limit.timing: [] for limit in gate.timings}
    for _ in range(PROCESSES if samples else 0):
        child = WorkerProcess(makers.pair)
        _possible(gate, child, makers.steps)
        for timing in samples:
            child.speed(timing)  # warm-up
        for _ in range(-(-gate.pairs // PROCESSES)):
            for timing, found in samples.items():
                found.append(1 / child.speed(timing))
        child.finish()
    ratios = {
        str(timing): Ratio(median_interval(found, 1 - CONFIDENCE), len(found)) for timing, found in samples.items()
    }
    return replace(now, peak_bytes=memory_of(makers, gate), ratios={**now.ratios, makers.kind: ratios})
