"""Compare the artifact's logits and states with the reference's, case by case and row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array, Ids, StateSpec
from h1export.report.checks import CheckKind, Comparison
from h1export.report.histogram import Histogram
from h1export.report.report import LOGIT_ERROR, Row
from h1export.runtime.runner import Comparable, Runner
from h1export.validate.accuracy.agreement import judged
from h1export.validate.accuracy.cases import Case, cases
from h1export.validate.accuracy.logits import logit_figures, position_errors
from h1export.validate.accuracy.reference import Reference
from h1export.validate.accuracy.states import StatePair, row_of_batch, state_errors


@dataclass(frozen=True)
class Run:
    """The artifact's outputs in one case, row by row and without padding.

    Attributes:
        case: the case.
        ids: the token ids [seq] of each row.
        logits: the logits [positions, vocab] of each row.
        positions: the columns of the padded batch that have logits.
        states: the states of each row by StateTensor.key, canonical and without the batch axis.
        impossible: why the runtime cannot run the case, in which the others are empty; it is empty where it can.
    """

    case: Case
    ids: tuple[Ids, ...]
    logits: tuple[Array, ...]
    positions: Ids
    states: tuple[dict[str, Array], ...]
    impossible: str = ""


def run_cases(runner: Comparable[Any], seed: int, quick: bool = False) -> Iterator[Run]:
    """Run every case, or those that are ``quick``, that the runner's limits allow, on random token ids."""
    rng = np.random.default_rng(seed)
    states = StateSpec.of(runner.config)
    for case in cases(runner.config):
        if quick and not case.quick:
            continue
        batch = len(case.pads)
        ids = rng.integers(0, runner.config.vocab_size, (batch, case.length), dtype=np.int64)
        if impossible := _impossible(case, runner):
            yield Run(case, (), (), positions=np.zeros(0, np.int64), states=(), impossible=impossible)
            continue
        mask = np.array([[column >= pad for column in range(case.length)] for pad in case.pads], np.int64)
        logits = []
        current = runner.initial(batch)
        end = 0
        for tokens in case.calls:
            end += tokens
            found, current = runner.step(ids[:, end - tokens : end], mask[:, :end], current)
            logits.append(found)
        ends = np.cumsum(case.calls)
        positions = np.arange(case.length) if runner.limits.all_logits else ends - 1
        joined = np.concatenate(logits, axis=1)
        snapshot = runner.snapshot(current)
        yield Run(
            case,
            tuple(ids[row, pad:] for row, pad in enumerate(case.pads)),
            tuple(joined[row, positions >= pad] for row, pad in enumerate(case.pads)),
            positions=positions,
            states=tuple(row_of_batch(snapshot, states, row, pad=pad) for row, pad in enumerate(case.pads)),
        )


def _impossible(case: Case, runner: Runner[Any]) -> str:
    """Return why the runner's limits rule a case out; empty where they do not."""
    limits = runner.limits
    if limits.max_batch is not None and len(case.pads) > limits.max_batch:
        return f"the runtime takes at most {limits.max_batch} rows at a time"
    if limits.max_context is not None and case.length > limits.max_context:
        return f"the artifact has room for {limits.max_context} tokens"
    return ""


@dataclass(frozen=True)
class JudgedRun:
    """A Run of one case, what it is compared with, and metric -> tolerance."""

    comparison: Comparison
    run: Run
    tolerances: Mapping[str, float]


def case_rows(judged_runs: Sequence[JudgedRun], reference: Reference, config: FalconH1Config) -> list[Row]:
    """Return a row for each run of the same case, in order; the reference runs once."""
    possible = [judged_run.run for judged_run in judged_runs if not judged_run.run.impossible]
    truths = [reference.full(ids) for ids in possible[0].ids] if possible else []
    return [_case_row(judged_run, truths, StateSpec.of(config)) for judged_run in judged_runs]


def _case_row(judged_run: JudgedRun, truths: Sequence[tuple[Array, dict[str, Array]]], states: StateSpec) -> Row:
    comparison = judged_run.comparison
    run = judged_run.run
    case = run.case
    if run.impossible:
        return Row(CheckKind.CASE, comparison, case=case.name, length=case.length, note=run.impossible)
    logit_pairs: list[tuple[Array, Array]] = []
    state_pairs: list[StatePair] = []
    for logits, found, pad, (truth, truth_states) in zip(run.logits, run.states, case.pads, truths, strict=True):
        logit_pairs.append((logits, truth[[p - pad for p in run.positions if p >= pad]]))
        state_pairs.append((found, truth_states))
    errors = state_errors(state_pairs, states)
    worst = max(errors, key=errors.__getitem__)
    figures = logit_figures(logit_pairs) | {"states": errors[worst]}
    return Row(
        CheckKind.CASE,
        comparison,
        case=case.name,
        length=case.length,
        figures=figures,
        tolerances=judged(figures, logit_pairs, comparison, tolerances=judged_run.tolerances),
        note=f"worst state {worst}",
        details=errors,
        histograms={LOGIT_ERROR: Histogram.of(position_errors(logit_pairs))},
    )
