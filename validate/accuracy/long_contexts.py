"""Long contexts: the states after a prefill in chunks, and the time of a token at that depth."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from h1export.model.falcon_h1.states import Array, Ids, StateSpec
from h1export.report.checks import CheckKind, Comparison
from h1export.report.histogram import Histogram
from h1export.report.report import DECODE_MS, LOGIT_ERROR, PREFILL_MS, Row
from h1export.runtime.runner import Comparable, Runner, Session
from h1export.validate.accuracy.agreement import judged
from h1export.validate.accuracy.logits import logit_figures, position_errors
from h1export.validate.accuracy.reference import Reference
from h1export.validate.accuracy.states import row_of_batch, state_errors

CHUNK = 512  # tokens a call
TAIL = 64  # the last positions, whose logits are compared
STEPS = 8  # decode steps that are timed


def context_rows(
    runners: Mapping[Comparison, Comparable[Any]],
    reference: Reference,
    contexts: Sequence[int],
    *,
    tolerances: Mapping[str, float],
    seed: int,
) -> list[Row]:
    """Run random tokens of each length of ``contexts`` through each runner; the reference runs once a length."""
    rows = []
    for context in sorted(contexts):
        config = next(iter(runners.values())).config
        room = min(one.limits.max_context or config.max_position_embeddings for one in runners.values())
        if context > room:
            note = f"the artifact has room for {room} tokens"
            rows += [Row(CheckKind.CONTEXT, comparison, length=context, note=note) for comparison in runners]
            continue
        ids = np.random.default_rng(seed).integers(0, config.vocab_size, context, dtype=np.int64)
        truth, truth_states = reference.in_chunks(ids, TAIL)
        for comparison, runner in runners.items():
            logits, states = _prefill(runner, ids)
            errors = state_errors([(states, truth_states)], StateSpec.of(config))
            worst = max(errors, key=errors.__getitem__)
            pairs = [(logits, truth[-len(logits) :])]
            figures = logit_figures(pairs) | {"states": errors[worst]}
            chosen = judged(figures, pairs, comparison, tolerances=tolerances)
            histograms = {LOGIT_ERROR: Histogram.of(position_errors(pairs))}
            rows.append(
                Row(
                    CheckKind.CONTEXT,
                    comparison,
                    length=context,
                    figures=figures,
                    tolerances=chosen,
                    note=f"worst state {worst}",
                    details=errors,
                    histograms=histograms,
                )
            )
    return rows


def _prefill(runner: Comparable[Any], ids: Ids) -> tuple[Array, dict[str, Array]]:
    """Run ids [seq] in chunks; return the logits of the last TAIL positions (or of the last alone) and the states."""
    states = runner.initial(1)
    kept = []
    for start in range(0, len(ids), CHUNK):
        chunk = ids[None, start : start + CHUNK]
        logits, states = runner.step(chunk, np.ones((1, start + chunk.shape[1]), np.int64), states)
        kept.append(logits[0, -TAIL:])
    tail = np.concatenate(kept)[-TAIL:] if runner.limits.all_logits else kept[-1]
    return tail, row_of_batch(runner.snapshot(states), StateSpec.of(runner.config), 0, pad=0)


def cost_rows(runner: Runner[Any], contexts: Sequence[int], *, seed: int) -> list[Row]:
    """Time the runner at each length of ``contexts``, in a session whose states are updated in place.

    The figures are milliseconds a token: prefill_ms in the last chunk before the context's end, decode_ms at its end.
    """
    if runner.provenance.emulated:
        note = f"computed by {runner.provenance.kernels}: its speed says nothing"
        return [Row(CheckKind.CONTEXT_COST, Comparison.ALONE, note=note)]
    room = runner.limits.max_context or runner.config.max_position_embeddings
    lengths = [context for context in sorted(contexts) if context <= room]
    ids = np.random.default_rng(seed).integers(0, runner.config.vocab_size, max(lengths, default=0), dtype=np.int64)
    if lengths:
        _cost(runner, ids[: lengths[0]])  # the first run is slower
    note = f"a token, in chunks of {CHUNK}, and the median of {STEPS} steps"
    return [
        Row(CheckKind.CONTEXT_COST, Comparison.ALONE, length=length, figures=_cost(runner, ids[:length]), note=note)
        for length in lengths
    ]


def _cost(runner: Runner[Any], ids: Ids) -> dict[str, float]:
    prompt = ids[None, :-STEPS]
    chunks = np.split(prompt, range(prompt.shape[1] % CHUNK or CHUNK, prompt.shape[1], CHUNK), axis=1)
    session = runner.start(1, capacity=len(ids))
    prefill = [_timed(session, chunk) for chunk in chunks]
    decode = [_timed(session, token) for token in np.split(ids[None, -STEPS:], STEPS, axis=1)]
    return {PREFILL_MS: 1e3 * prefill[-1] / chunks[-1].shape[1], DECODE_MS: 1e3 * median(decode)}


def _timed(session: Session, ids: Ids) -> float:
    start = time.perf_counter()
    session.append(ids, keep=1)
    return time.perf_counter() - start
