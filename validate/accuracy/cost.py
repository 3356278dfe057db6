"""The row that says what integers cost a user: divergence, agreement and greedy length on one text, and how sure it is.

The figures are those of the text and of the greedy texts against the full model; this module decides whether the text
is long enough for a verdict. Standard errors are those of a bootstrap over windows (perplexity.py). Two rules:

- At least LEAST_WINDOWS windows: the relative error of a standard error from n windows is about 1 / sqrt(2 (n - 1)),
  which is a quarter for 8.
- The 95 % interval of the mean divergence reaches at most WIDEST of it to each side. Then the intervals of two choices
  whose divergences differ by a factor of 5/3 or more do not overlap; a bit more for every weight is a factor of 4.

Source of the first rule: the standard deviation of a sample of normal values (Kenney and Keeping, Mathematics of
Statistics, part 2, 1951, section 7.8).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from h1export.artifact.manifest import Manifest
from h1export.report.checks import CheckKind, Comparison
from h1export.report.report import KL, Row
from h1export.validate.accuracy.perplexity import WINDOW

LEAST_WINDOWS = 8
WIDEST = 0.25
SIGMAS = 1.96  # standard errors to each side of a 95 % interval
FIGURES = (KL, "kl_p99", "top1")  # of the text
GREEDY = "greedy"  # the median of tokens until the greedy text differs from the full model's
KL_METRIC = f"{Comparison.SOURCE}.{KL}"


def integers_of(manifest: Manifest) -> str:
    """Return the name of an artifact's shortest integers, such as "int4"; empty where it has none."""
    return f"int{min(weight.bits for weight in manifest.weights)}" if manifest.weights else ""


def cost_row(integers: str, text: Row, greedy: Row, *, tokens: int, tolerances: Mapping[str, float]) -> Row:
    """Return what ``integers`` cost, from the rows of a text of ``tokens`` tokens and of greedy texts.

    The mean divergence is judged where the text is long enough; where it is not, the note says what is missing.
    """
    if KL not in text.figures:
        return Row(CheckKind.COST, Comparison.SOURCE, case=integers, note=text.note)
    kept = {name: text.figures[name] for figure in FIGURES for name in (figure, f"{figure}_se")}
    figures = kept | ({GREEDY: greedy.figures["tokens"]} if greedy.figures else {})
    reason = too_short(tokens, figures[KL], figures[f"{KL}_se"])
    judged = {KL: tolerances[KL_METRIC]} if KL_METRIC in tolerances and not reason else {}
    return Row(
        CheckKind.COST,
        Comparison.SOURCE,
        case=integers,
        figures=figures,
        tolerances=judged,
        note="; ".join(filter(None, (text.note, reason))),
    )


def too_short(tokens: int, kl: float, error: float) -> str:
    """Return why a text of ``tokens`` tokens is too short for a verdict; empty where it is not.

    ``kl`` is the mean divergence on it and ``error`` its standard error.
    """
    least = LEAST_WINDOWS * WINDOW
    share = SIGMAS * error / kl if kl > 0 else 0.0
    if math.isnan(share):
        return ""  # the figures fail by themselves
    wanted = tokens * (share / WIDEST) ** 2
    if tokens > least and share <= WIDEST:
        return ""
    more = max(least + 1, math.ceil(wanted / WINDOW) * WINDOW)
    known = f"its mean KL is known to {share:.0%}" if tokens > 2 * WINDOW else "it is one or two windows"
    return f"the text is too short for a verdict: {known}; about {more} tokens would do"
