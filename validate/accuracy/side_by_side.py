"""Judge several artifacts of one checkpoint by the same calls and the same text, whatever their runtimes are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from h1export.progress import Progress
from h1export.report.checks import Comparison
from h1export.report.report import Row
from h1export.runtime.runner import Inspectable
from h1export.validate.accuracy.parity import JudgedRun, case_rows, run_cases
from h1export.validate.accuracy.reference import Reference
from h1export.validate.accuracy.shared_integers import integer_rows
from h1export.validate.accuracy.text_rows import Text, text_rows


@dataclass(frozen=True)
class Contender:
    """An artifact's Runner, and metric -> tolerance."""

    runner: Inspectable[Any]
    tolerances: Mapping[str, float]


def side_by_side(
    contenders: Sequence[Contender],
    reference: Reference,
    text: Text,
    *,
    seed: int = 0,
    quick: bool = False,
    progress: Progress,
) -> list[list[Row]]:
    """Return the rows of each contender, in order: its cases, its text, and the integers that it shares.

    All are compared with the reference as they ship, and the reference runs once for all of them.

    Args:
        contenders: the artifacts of one checkpoint.
        reference: the model on the checkpoint's weights.
        text: the text that they score.
        seed: the seed of the random tokens of the cases.
        quick: whether to run only the cases that are ``quick``.
        progress: shows the stages.
    """
    progress.stage("cases")
    runs = [list(run_cases(contender.runner, seed, quick)) for contender in contenders]
    config = reference.config
    cases = [
        case_rows(
            [
                JudgedRun(Comparison.SOURCE, run, contender.tolerances)
                for run, contender in zip(each, contenders, strict=True)
            ],
            reference,
            config,
        )
        for each in zip(*runs, strict=True)
    ]
    progress.stage("text")
    texts = text_rows(
        [contender.runner for contender in contenders],
        reference,
        text,
        tolerances=[contender.tolerances for contender in contenders],
    )
    progress.stage("integers")
    integers = integer_rows([contender.runner.stored_weights() for contender in contenders])
    return [
        [*of_cases, of_text, of_integers]
        for *of_cases, of_text, of_integers in zip(*cases, texts, integers, strict=True)
    ]
