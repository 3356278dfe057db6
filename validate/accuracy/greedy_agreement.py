"""Count how many tokens of the artifact's greedy text equal the reference's before the first that differs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from h1export.model.falcon_h1.states import Ids
from h1export.report.checks import CheckKind, Comparison
from h1export.report.report import Row
from h1export.runtime.runner import Runner
from h1export.validate.accuracy.reference import Reference

PROMPT_TOKENS = 32
NEW_TOKENS = 64  # of a continuation


@dataclass(frozen=True)
class Continuation:
    """A prompt [PROMPT_TOKENS] and a model's greedy continuation [NEW_TOKENS]. An end token does not end it."""

    prompt: Ids
    tokens: Ids

    def agreed(self, reference: Reference) -> int:
        """Count the tokens before the first that the reference would not have chosen.

        One forward is enough: up to there, the reference's own greedy text has the same tokens before every position.
        """
        logits, _ = reference.full(np.concatenate([self.prompt, self.tokens[:-1]]))
        differ = np.flatnonzero(logits[len(self.prompt) - 1 :].argmax(-1) != self.tokens)
        return int(differ[0]) if len(differ) else len(self.tokens)


def prompts(ids: Ids, count: int, seed: int) -> list[Ids]:
    """Return ``count`` stretches of a text's ``ids`` at random places; none where the text is shorter than one."""
    if len(ids) < PROMPT_TOKENS:
        return []
    starts = np.random.default_rng(seed).integers(0, len(ids) - PROMPT_TOKENS + 1, count)
    return [ids[start : start + PROMPT_TOKENS] for start in starts]


def continuations(runner: Runner[Any], starts: Sequence[Ids]) -> Iterator[Continuation]:
    """Yield the runner's continuation of each prompt, in states that it updates in place."""
    for prompt in starts:
        session = runner.start(1, capacity=PROMPT_TOKENS + NEW_TOKENS)
        tokens = []
        logits = session.append(prompt[None], keep=1)
        for _ in range(NEW_TOKENS):
            tokens.append(int(logits[0, -1].argmax()))
            if len(tokens) < NEW_TOKENS:
                logits = session.append(np.array([tokens[-1:]]))
        yield Continuation(prompt, np.array(tokens))


def greedy_agreement_row(comparison: Comparison, texts: Sequence[Continuation], reference: Reference) -> Row:
    """Return the row of all prompts.

    Its figures are "tokens", the median number of tokens that agree, NEW_TOKENS where none differs; and "never", the
    share of prompts where none differs.
    """
    agreed = [text.agreed(reference) for text in texts]
    never = float(np.mean([count == NEW_TOKENS for count in agreed]))
    figures = {"tokens": float(np.median(agreed)), "never": never}
    note = (
        f"against {comparison}: {len(texts)} prompts of {PROMPT_TOKENS} tokens, "
        f"and {NEW_TOKENS} at most before a difference"
    )
    details = {f"prompt {i}": float(count) for i, count in enumerate(agreed)}
    return Row(CheckKind.GREEDY_TEXT, comparison, figures=figures, note=note, details=details)


def why_no_texts(runner: Runner[Any], starts: Sequence[Ids]) -> str:
    """Return why greedy texts cannot be generated from ``starts``; the text is empty where they can."""
    room = runner.limits.max_context or runner.config.max_position_embeddings
    if room < PROMPT_TOKENS + NEW_TOKENS:
        return f"{PROMPT_TOKENS + NEW_TOKENS} tokens do not fit into {room}"
    return "" if starts else "not requested, or there is no text"
