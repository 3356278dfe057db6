"""Long contexts: what a prefill in chunks leaves in the states, and what a token costs there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from h1export.model.falcon_h1.states import Array, Ids, StateSpec
from h1export.report.histogram import Histogram
from h1export.report.report import LOGIT_ERROR, Row
from h1export.runtime.runner import Comparable, Runner, Session
from h1export.validate.accuracy.logits import logit_figures, position_errors
from h1export.validate.accuracy.reference import Reference
from h1export.validate.accuracy.states import row_of_batch, state_errors

CHUNK = 512  # tokens a call
TAIL = 64  # the last positions, whose logits are compared
STEPS = 8  # decode steps that are timed


def context_rows(
    ways: Mapping[str, Comparable[Any]],
    reference: Reference,
    contexts: Sequence[int],
    *,
    limits: Mapping[str, float],
    seed: int,
) -> list[Row]:
    """For each of ``contexts``, random tokens: a row for each group of metrics in ``ways``, in which the reference runs once."""
    rows = []
    for context in sorted(contexts):
        check = f"context {context}"
        config = next(iter(ways.values())).config
        room = min(way.limits.max_context or config.max_position_embeddings for way in ways.values())
        if context > room:
            rows += [Row(check, group, note=f"the artifact has room for {room} tokens") for group in ways]
            continue
        ids = np.random.default_rng(seed).integers(0, config.vocab_size, context, dtype=np.int64)
        truth, truth_states = reference.in_subgraphs(ids, TAIL)
        for group, runner in ways.items():
            logits, states = _prefill(runner, ids)
            errors = state_errors([(states, truth_states)], StateSpec.of(config))
            worst = max(errors, key=errors.__getitem__)
            pairs = [(logits, truth[-len(logits) :])]
            figures = logit_figures(pairs) | {"states": errors[worst]}
            gated = {name: limits[metric] for name in figures if (metric := f"{group}.{name}") in limits}
            histograms = {LOGIT_ERROR: Histogram.of(position_errors(pairs))}
            rows.append(
                Row(
                    check,
                    group,
                    figures,
                    limits=gated,
                    note=f"worst state {worst}",
                    details=errors,
                    histograms=histograms,
                )
            )
    return rows


def _prefill(runner: Comparable[Any], ids: Ids) -> tuple[Array, dict[str, Array]]:
    """Logits of the last TAIL positions (or the last one, where there are no others) and the states, of ids [seq] in chunks."""
    states = runner.initial(1)
    kept = []
    for start in range(0, len(ids), CHUNK):
        chunk = ids[None, start : start + CHUNK]
        logits, states = runner.step(chunk, np.ones((1, start + chunk.shape[1]), np.int64), states)
        kept.append(logits[0, -TAIL:])
    tail = np.concatenate(kept)[-TAIL:] if runner.limits.all_logits else kept[-1]
    return tail, row_of_batch(runner.snapshot(states), StateSpec.of(runner.config), 0, pad=0)


def cost_rows(runner: Runner[Any], contexts: Sequence[int], group: str, *, seed: int) -> list[Row]:
    """prefill_ms: of a token in the last chunk before a context's end. decode_ms: of one at its end. Both in states in place."""
    if runner.provenance.emulated:
        return [Row("cost by context", group, note=f"computed by {runner.provenance.kernels}: its speed says nothing")]
    room = runner.limits.max_context or runner.config.max_position_embeddings
    lengths = [context for context in sorted(contexts) if context <= room]
    ids = np.random.default_rng(seed).integers(0, runner.config.vocab_size, max(lengths, default=0), dtype=np.int64)
    if lengths:
        _cost(runner, ids[: lengths[0]])  # the first run is slower
    note = f"a token, in chunks of {CHUNK}, and the median of {STEPS} steps"
    return [Row(f"cost at {length}", group, _cost(runner, ids[:length]), note=note) for length in lengths]


def _cost(runner: Runner[Any], ids: Ids) -> dict[str, float]:
    prompt = ids[None, :-STEPS]
    chunks = np.split(prompt, range(prompt.shape[1] % CHUNK or CHUNK, prompt.shape[1], CHUNK), axis=1)
    sequence = runner.start(1, capacity=len(ids))
    prefill = [_timed(sequence, chunk) for chunk in chunks]
    decode = [_timed(sequence, token) for token in np.split(ids[None, -STEPS:], STEPS, axis=1)]
    return {"prefill_ms": 1e3 * prefill[-1] / chunks[-1].shape[1], "decode_ms": 1e3 * median(decode)}


def _timed(sequence: Session, ids: Ids) -> float:
    start = time.perf_counter()
    sequence.append(ids)
    return time.perf_counter() - start
