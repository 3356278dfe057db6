"""Check whether an artifact takes more nodes, bytes, memory or time than its baseline."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from h1export import host
from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.report.checks import Phase
from h1export.report.report import Verdict
from h1export.validate.speed.decision import decide_all, median_interval
from h1export.validate.speed.gate_checks import Check, GateCheckKind
from h1export.validate.speed.gate_file import Baseline, Gate, Limit, Ratio, model_of
from h1export.validate.speed.memory_traffic import step_bytes
from h1export.validate.speed.statistics import CONFIDENCE
from h1export.validate.speed.worker import TimedModel, Timing, WorkerProcess

BEST_OF = 3  # timings of each side in a pair, of which the fastest counts: what disturbs one only ever adds to it
PROCESSES = 3  # in which a baseline is measured: the placement of memory differs from process to process
WRITE = "run h1export gate with --write-baseline and commit the file, if the change is meant"


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


class ModelPair:
    """Two models in one process, timed side by side in random order."""

    def __init__(self, ours: TimedModel, theirs: TimedModel) -> None:
        self.limits = ours.limits
        self.provenance = ours.provenance
        self._models = (ours, theirs)
        self._random = np.random.default_rng()

    def speed(self, timing: Timing) -> float:
        """Return the speed of the first divided by that of the second, each the best of BEST_OF."""
        found = [0.0, 0.0]
        for i in self._random.permutation(2):
            found[i] = max(self._models[i].speed(timing) for _ in range(BEST_OF))
        return found[0] / found[1]


@dataclass(frozen=True)
class Makers:
    """The functions that make the models of worker processes.

    Attributes:
        pair: the artifact and its reference, which are timed side by side.
        alone: the artifact, whose memory is measured.
        steps: the number of tokens that one timing decodes.
        kind: the kind of machine, by which a baseline keeps its ratios.
    """

    pair: Callable[[], TimedModel]
    alone: Callable[[], TimedModel]
    steps: int
    kind: str = field(default_factory=host.cpu_kind)


def counted(artifact: Artifact, gate: Gate, operations: Mapping[str, Mapping[str, int]]) -> Baseline:
    """Return the figures that need no clock."""
    decoded = [limit.timing for limit in gate.timings if limit.timing.phase is Phase.DECODE]
    steps = {
        timing.key: step_bytes(artifact.manifest, artifact.config, timing.batch, depth=timing.tokens)
        for timing in decoded
    }
    files = {name: size for name, (_, size) in artifact.manifest.files.items()}
    spills = {name: kernel["spilled"] for name, kernel in artifact.manifest.requirements.get("kernels", {}).items()}
    return Baseline(model_of(artifact.manifest), operations, files, step_bytes=steps, spills=spills)


def counted_checks(now: Baseline, then: Baseline, gate: Gate) -> Iterator[Check]:
    """Hold nodes, files, bytes read a step and spills against the baseline."""
    if now.model != then.model:
        raise H1ExportError("baseline", "is of another model, or of other build options", WRITE)
    for graph in dict.fromkeys((*now.nodes, *then.nodes)):
        found = (now.nodes.get(graph, {}), then.nodes.get(graph, {}))
        yield _within(GateCheckKind.NODES, *found, factor=gate.nodes, file=graph)
    yield _within(GateCheckKind.FILE_BYTES, now.files, then.files, factor=gate.bytes)
    if now.step_bytes:
        _in_baseline(now.step_bytes, then.step_bytes)
        yield _within(GateCheckKind.STEP_BYTES, now.step_bytes, then.step_bytes, factor=gate.step_bytes)
    if now.spills:
        yield _within(GateCheckKind.SPILLS, now.spills, then.spills, factor=1.0)


def _within(
    kind: GateCheckKind, now: Mapping[str, int], then: Mapping[str, int], *, factor: float, file: str = ""
) -> Check:
    """Return the check of a total; its note names what is beyond its own limit, or less than it was."""
    beyond = [
        f"{key} {now[key]}, was {then.get(key, 0)}" for key in sorted(now) if now[key] > factor * then.get(key, 0)
    ]
    less = [f"{key} {now.get(key, 0)}, was {then[key]}" for key in sorted(then) if now.get(key, 0) < then[key]]
    note = "; ".join(beyond) or ("less than the baseline: " + "; ".join(less) if less else "")
    return Check(
        kind,
        Verdict.FAIL if beyond else Verdict.PASS,
        file=file,
        figure=sum(now.values()),
        limit=factor * sum(then.values()),
        note=note,
    )


def _in_baseline(wanted: Iterable[str], found: Mapping[str, Any]) -> None:
    if missing := [name for name in wanted if name not in found]:
        raise H1ExportError("baseline", f"has no figure for {', '.join(missing)}", WRITE)


def memory_of(makers: Makers, gate: Gate) -> int:
    """Return the peak memory in bytes of a worker that does each timing once, see WorkerProcess.finish."""
    worker = WorkerProcess(makers.alone)
    for limit in _checked_limits(gate, worker, makers.steps):
        worker.speed(limit.timing)
    return worker.finish()


def _checked_limits(gate: Gate, worker: WorkerProcess, steps: int) -> tuple[Limit, ...]:
    """Return the gate's limits after a check that the worker's model can do all of their timings."""
    for limit in gate.timings:
        if reason := limit.timing.refused(worker.limits, steps):
            raise H1ExportError(
                "gate", f"{limit.timing.key}: the artifact {reason}", "choose another timing in the gates' file"
            )
    return gate.timings


def measured_checks(makers: Makers, then: Baseline, gate: Gate) -> Iterator[Check]:
    """Hold memory and every timing against the baseline.

    Raises:
        H1ExportError: the baseline lacks a timing, or the artifact has no room for one.
    """
    if then.peak_bytes:
        peak = memory_of(makers, gate)
        limit = gate.memory * then.peak_bytes
        yield Check(GateCheckKind.MEMORY, Verdict.FAIL if peak > limit else Verdict.PASS, figure=peak, limit=limit)
    kind = makers.kind
    timings = [limit.timing for limit in gate.timings]
    if not timings:
        return
    if kind not in then.ratios:
        what = f"the baseline is of {' and '.join(then.ratios) or 'no machine'}, and this one is {kind}"
        settle = f"{what}: run h1export gate --write-baseline here, which keeps the others"
        for timing in timings:
            yield Check(GateCheckKind.TIMING, Verdict.INCONCLUSIVE, timing=timing, note=settle)
        return
    ratios = then.ratios[kind]
    _in_baseline([timing.key for timing in timings], ratios)
    worker = WorkerProcess(makers.pair)
    limits = {limit.timing: limit.slowdown for limit in _checked_limits(gate, worker, makers.steps)}
    for timing in limits:
        worker.speed(timing)  # warm-up
    found = decide_all(lambda timing: 1 / worker.speed(timing) / ratios[timing.key].estimate.median, limits, gate.pairs)
    worker.finish()
    for timing, decision in found.items():
        e = decision.estimate
        note = decision.settle or f"{decision.pairs} pairs"
        yield Check(
            GateCheckKind.TIMING,
            decision.verdict,
            timing=timing,
            figure=e.median,
            limit=decision.limit,
            low=e.low,
            high=e.high,
            note=note,
        )


def measured(makers: Makers, now: Baseline, gate: Gate) -> Baseline:
    """Return ``now`` with its memory and ratios on this kind of machine, from PROCESSES processes."""
    samples: dict[Timing, list[float]] = {limit.timing: [] for limit in gate.timings}
    for _ in range(PROCESSES if samples else 0):
        worker = WorkerProcess(makers.pair)
        _checked_limits(gate, worker, makers.steps)
        for timing in samples:
            worker.speed(timing)  # warm-up
        for _ in range(-(-gate.pairs // PROCESSES)):
            for timing, found in samples.items():
                found.append(1 / worker.speed(timing))
        worker.finish()
    ratios = {
        timing.key: Ratio(median_interval(found, 1 - CONFIDENCE), len(found)) for timing, found in samples.items()
    }
    return replace(now, peak_bytes=memory_of(makers, gate), ratios={**now.ratios, makers.kind: ratios})
