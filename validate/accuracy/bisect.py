"""Find where an artifact first differs from the reference: call by call, layer by layer, probe point by probe point.

An error spreads to all that is computed from it, so the first point beyond tolerance names the layer and the ops
between it and the point before. States are compared right after the ops that compute them, so that a layer with right
outputs and a wrong state shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from h1export.model.falcon_h1.probes import ProbePoint, probe_name
from h1export.model.falcon_h1.projections import SUSPECT_MLP, SUSPECT_OPS
from h1export.model.falcon_h1.states import Array, Ids, StateKind
from h1export.model.falcon_h1.tensors import projection_of, split_layer
from h1export.report.checks import CheckKind, Comparison, Phase
from h1export.report.report import Row, Verdict
from h1export.runtime.runner import Comparable, Observable
from h1export.validate.accuracy.logits import relative_error
from h1export.validate.accuracy.reference import Reference

CALLS = (24, 1, 1, 6, 1)  # a prefill, decode steps, a chunk between them
ROTARY = "rotary embedding"
HEAD = "final norm or lm_head"
EMBEDDING = "embedding"


@dataclass(frozen=True)
class Suspect:
    """A place that was compared, its error over the reference's range, and the op family that it points to."""

    place: str
    family: str
    error: float


@dataclass(frozen=True)
class Call:
    """The probes, the states after it, and the logits of a call: the artifact's or the reference's.

    ``start`` tokens precede it.
    """

    start: int
    probes: Mapping[str, Array]  # [new, width]
    states: Mapping[str, Array]  # canonical, without the batch axis
    logits: Array  # [new or 1, vocab]


def bisect(
    runner: Comparable[Any], reference: Reference, comparison: Comparison, *, tolerance: float, seed: int
) -> list[Row]:
    """Return a row for prefill and one for decode.

    Each names the first layer and op family beyond ``tolerance``, and has the error at every place in its details.
    ``comparison`` names what ``runner`` and ``reference`` stand for. A runner without probes gets one row that says so.
    """
    if not isinstance(runner, Observable):
        return [
            Row(CheckKind.BISECT, comparison, note="this runtime does not show what lies between inputs and outputs")
        ]
    ids = np.random.default_rng(seed).integers(0, runner.config.vocab_size, (1, sum(CALLS)), dtype=np.int64)
    rows = []
    layers = runner.config.num_hidden_layers
    pairs = list(_pairs(runner, reference, ids))
    for phase, chosen in ((Phase.PREFILL, pairs[:1]), (Phase.DECODE, pairs[1:])):
        calls = [list(_suspects(found, truth, layers)) for found, truth in chosen]
        first = next((suspect for call in calls for suspect in call if not suspect.error <= tolerance), None)
        details: dict[str, float] = {}
        for suspect in (suspect for call in calls for suspect in call):
            details[suspect.place] = float(np.maximum(details.get(suspect.place, 0.0), suspect.error))
        worst = first or max((suspect for call in calls for suspect in call), key=lambda suspect: suspect.error)
        note = f"first beyond tolerance: {_words(first)}" if first else f"right in {layers} layers, worst {worst.place}"
        rows.append(
            Row(
                CheckKind.BISECT,
                comparison,
                phase=phase,
                figures={"error": worst.error},
                tolerances={"error": tolerance},
                note=note,
                details=details,
            )
        )
    return rows


def integers_row(judged: Row) -> Row:
    """Return the row on stored integers by layer and op: it names the tensor furthest from the checkpoint."""
    worst = max(judged.details, key=judged.details.__getitem__)
    layer = split_layer(worst)[0]
    projection = projection_of(worst)
    where = worst if layer is None or projection is None else f"layer {layer}, {projection.op}"
    beyond = judged.verdict is Verdict.FAIL
    note = f"beyond rounding: {where} ({worst})" if beyond else f"{len(judged.details)} tensors, worst {worst}"
    return Row(
        CheckKind.BISECT_INTEGERS, judged.comparison, figures=judged.figures, tolerances=judged.tolerances, note=note
    )


def _words(suspect: Suspect) -> str:
    layer = suspect.place.partition(".")[0]
    return f"{f'layer {layer}, ' if layer.isdigit() else ''}{suspect.family} (at {suspect.place})"


def _pairs(runner: Observable[Any], reference: Reference, ids: Ids) -> Iterator[tuple[Call, Call]]:
    """Yield the artifact's and the reference's outputs of each of CALLS; the artifact continues from its own states."""
    states = runner.initial(1)
    end = 0
    every_logit, _, every_probe = reference.observe(ids[0])
    for tokens in CALLS:
        start = end
        end = end + tokens
        logits, states, probes = runner.observe(ids[:, start:end], np.ones((1, end), np.int64), states)
        snapshot = {key: state[0] for key, state in runner.snapshot(states).items()}
        found = Call(start, {name: value[0] for name, value in probes.items()}, snapshot, logits[0])
        truth = {name: value[start:end] for name, value in every_probe.items()}
        yield found, Call(start, truth, reference.full(ids[0, :end])[1], every_logit[end - len(logits[0]) : end])


def _suspects(found: Call, truth: Call, layers: int) -> Iterator[Suspect]:
    """Yield every place in the order of the computation."""
    for layer in range(layers):
        for point in ProbePoint:
            yield from _probe(found, truth, layer, point=point)
            if point is ProbePoint.VALUE:
                yield from _cache(found, truth, layer, kind=StateKind.VALUE)
                yield from _cache(found, truth, layer, kind=StateKind.KEY)
            if point is ProbePoint.CONV:
                yield _state(found, truth, layer, kind=StateKind.CONV)
            if point is ProbePoint.GATED:
                yield _state(found, truth, layer, kind=StateKind.RECURRENT)
    yield from _probe(found, truth, layers, point=ProbePoint.RESIDUAL)
    yield Suspect("logits", HEAD, relative_error(found.logits, truth.logits))


def _probe(found: Call, truth: Call, layer: int, *, point: ProbePoint) -> Iterator[Suspect]:
    name = probe_name(layer, point)
    if name in found.probes:
        place = name
        family = SUSPECT_OPS[point]
        if point is ProbePoint.RESIDUAL:  # the output of the layer before
            place, family = (f"{layer - 1}.output", family) if layer else (EMBEDDING, EMBEDDING)
            if layer and probe_name(layer - 1, ProbePoint.PRODUCT) not in found.probes:
                family = SUSPECT_MLP
        yield Suspect(place, family, relative_error(found.probes[name], truth.probes[name]))


def _cache(found: Call, truth: Call, layer: int, *, kind: StateKind) -> Iterator[Suspect]:
    """Compare keys or values: those of the calls before, and those that this call added."""
    ours = found.states[f"{layer}.{kind}"]
    theirs = truth.states[f"{layer}.{kind}"]
    kept = f"{layer}.{kind} kept"
    added = f"{layer}.{kind} added"
    family = f"{kind} cache"
    if ours.shape != theirs.shape:
        yield Suspect(kept, family, float("inf"))
        return
    error = np.abs(ours - theirs).max(axis=(0, 2)) / float(theirs.max() - theirs.min())  # of each position
    if found.start:
        yield Suspect(kept, family, float(error[: found.start].max()))
    if kind is StateKind.KEY:
        if not found.start:  # rotary embedding leaves position 0 as it is
            yield Suspect(added, family, float(error[0]))
        family = ROTARY
    yield Suspect(added, family, float(error[found.start :].max()))


def _state(found: Call, truth: Call, layer: int, *, kind: StateKind) -> Suspect:
    name = f"{layer}.{kind}"
    return Suspect(name, f"{kind} as it is handed on", relative_error(found.states[name], truth.states[name]))
