"""Generate token by token with any Runner, greedy or sampled; a seed makes samples reproducible."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array, Ids
from h1export.runtime.runner import Runner
from h1export.runtime.sharing import OneReader

PREFILL_CHUNK = 512  # tokens of the prompt in one call, so that the logits of long prompts do not fill the memory


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: What the logits are divided by; 0 means the likeliest token.
        top_k: The number of likeliest tokens to choose from; 0 means all.
        top_p: The share of probability that the likeliest tokens to choose from have together.
        seed: The seed of the random choice.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            what = f"temperature {self.temperature}, top-k {self.top_k}, top-p {self.top_p}"
            raise H1ExportError("sampling", what, "expected temperature >= 0, top-k >= 0, 0 < top-p <= 1")

    def choose(self, logits: Array, rng: np.random.Generator) -> int:
        """Choose the next token by its logits [vocab]."""
        if self.temperature == 0:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / self.temperature
        order = np.argsort(-scaled, kind="stable")[: self.top_k or len(scaled)]
        probabilities = np.exp(scaled[order] - scaled[order[0]])
        probabilities /= probabilities.sum()
        kept = int(np.searchsorted(np.cumsum(probabilities), self.top_p)) + 1
        probabilities = probabilities[:kept] / probabilities[:kept].sum()
        return int(order[rng.choice(len(probabilities), p=probabilities)])


def generate(
    runner: Runner[Any], prompt: Ids, max_tokens: int, *, sampling: Sampling, eos: frozenset[int]
) -> Iterator[int]:
    """Return an iterator over new tokens after ``prompt`` [seq].

    Each iterator has a session of its own, so those of one Runner may be read in any order and by several threads; one
    iterator is read by one caller at a time.

    The text ends before an end token in ``eos``, after ``max_tokens`` tokens or where the model's context is full.

    Raises:
        H1ExportError: The prompt is empty, or fills the context.
    """
    return OneReader(_tokens(runner, prompt, max_tokens, sampling=sampling, eos=eos), "generation")


def _tokens(
    runner: Runner[Any], prompt: Ids, max_tokens: int, *, sampling: Sampling, eos: frozenset[int]
) -> Iterator[int]:
    context = runner.config.max_position_embeddings
    if not len(prompt):
        raise H1ExportError("prompt", "has no tokens", "give at least one")
    if len(prompt) >= context:
        raise H1ExportError("prompt", f"has {len(prompt)} tokens, and the model's context is {context}", "shorten it")
    rng = np.random.default_rng(sampling.seed)
    session = runner.start(1, capacity=min(len(prompt) + max_tokens, context))
    for start in range(0, len(prompt), PREFILL_CHUNK):
        logits = session.append(prompt[None, start : start + PREFILL_CHUNK])
    yield from new_tokens(
        logits[0, -1],
        lambda token: session.append(np.array([[token]]))[0, -1],
        min(max_tokens, context - len(prompt)),
        choose=lambda after: sampling.choose(after, rng),
        eos=eos,
    )


def new_tokens(
    logits: Array,
    append: Callable[[int], Array],
    most: int,
    *,
    choose: Callable[[Array], int],
    eos: frozenset[int],
) -> Iterator[int]:
    """Yield at most ``most`` tokens, up to an end token: the first by ``logits`` [vocab], the next by ``append``'s.

    ``append`` extends the sequence by a token. The last token is yielded, and not appended.
    """
    for left in reversed(range(most)):
        token = choose(logits)
        if token in eos:
            return
        yield token
        if left:
            logits = append(token)
