"""Rows about one text: bits per byte of models, and the divergence of their predictions from the reference's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from h1export.model.falcon_h1.states import Array, Ids
from h1export.report.checks import CheckKind, Comparison
from h1export.report.histogram import Histogram
from h1export.report.report import KL, LOGIT_ERROR, Row
from h1export.runtime.runner import Runner
from h1export.validate.accuracy import tolerances as defaults
from h1export.validate.accuracy.perplexity import WINDOW, Scored, text_figures, windows
from h1export.validate.accuracy.reference import Reference


@dataclass(frozen=True)
class Text:
    """A text that models score.

    Attributes:
        ids: its token ids; where they are fewer than two, nothing is scored.
        nbytes: the number of bytes that ``ids[1:]`` stand for.
        missing: why there are none.
    """

    ids: Ids
    nbytes: int
    missing: str = "the text is empty"

    def __str__(self) -> str:
        return f"{self.nbytes} bytes, {len(self.ids)} tokens"


def no_text(missing: str) -> Text:
    """Return a text of no tokens; ``missing`` says why there is none."""
    return Text(np.zeros(0, np.int64), 0, missing)


NOT_REQUESTED = no_text("not requested")


def text_rows(
    runners: Sequence[Runner[Any]],
    reference: Reference,
    text: Text,
    *,
    tolerances: Sequence[Mapping[str, float]],
) -> list[Row]:
    """Return the row of each runner, in order; the reference scores the text once.

    ``tolerances`` has metric -> tolerance for each runner.
    """
    reasons = [_no_text(runner, text) for runner in runners]
    able = {place: runner for place, runner in enumerate(runners) if not reasons[place]}
    scored: dict[int, list[Scored]] = {place: [] for place in able}
    for window in windows(text.ids) if able else ():
        truth = reference.full(window[:-1])[0]
        for place, runner in able.items():
            scored[place].append(Scored.of(_logits(runner, window[:-1]), truth, window))
    return [
        _row(scored[place], text, tolerances[place])
        if place in able
        else Row(CheckKind.TEXT, Comparison.SOURCE, note=reason)
        for place, reason in enumerate(reasons)
    ]


def _logits(runner: Runner[Any], ids: Ids) -> Array:
    """Return the logits [seq, vocab] of ids [seq], from empty states."""
    logits: Array = runner.step(ids[None], np.ones((1, len(ids)), np.int64), runner.initial(1))[0][0]
    return logits


def _row(scored: Sequence[Scored], text: Text, tolerances: Mapping[str, float]) -> Row:
    spread = {KL: [window.kl for window in scored], LOGIT_ERROR: [window.error for window in scored]}
    return Row(
        CheckKind.TEXT,
        Comparison.SOURCE,
        figures=text_figures(scored, text.nbytes),
        tolerances={"ratio": tolerances[defaults.TEXT_METRIC]},
        note=str(text),
        histograms={name: Histogram.of(np.concatenate(parts)) for name, parts in spread.items()},
    )


def _no_text(runner: Runner[Any], text: Text) -> str:
    """Return why no text can be scored; empty where it can."""
    if len(text.ids) < 2:
        return text.missing
    if not runner.limits.all_logits:
        return "the artifact gives the last position's logits only"
    if (room := runner.limits.max_context) is not None and room < WINDOW:
        return f"windows of {WINDOW} tokens do not fit into {room}"
    return ""
