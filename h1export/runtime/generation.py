"""Generate token by token with any Runner, greedy or sampled; a seed makes samples reproducible."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import numpy as np
import numpy.typing as npt

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array, Ids
from h1export.runtime.runner import Runner
from h1export.runtime.sharing import OneReader

# Calls of a prompt end at its multiples: the logits of a call fit the memory, and a server turns to others in between.
PREFILL_CHUNK = 128


def calls(start: int, end: int, borders: Sequence[int] = ()) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the calls that compute the tokens of a sequence from ``start`` to ``end``.

    A call ends at the next multiple of PREFILL_CHUNK, at the next of ``borders``, which are sorted, or at ``end``. So
    the calls from any of these places on are those of the whole sequence, and give the same logits, bit for bit: sums
    are not added up in another order, and activations are not rounded to other integers.
    """
    while start < end:
        after = bisect_right(borders, start)
        stop = min(end, (start // PREFILL_CHUNK + 1) * PREFILL_CHUNK, *borders[after : after + 1])
        yield start, stop
        start = stop


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: penalties change the logits first, then the others choose.

    Attributes:
        temperature: What the logits are divided by; 0 means the likeliest token.
        top_k: The number of likeliest tokens to choose from; 0 means all.
        top_p: The share of probability that the likeliest tokens to choose from have together.
        seed: The seed of the random choice.
        min_p: The least probability of a token to choose from, relative to that of the likeliest one; 0 means none.
        presence_penalty: What is subtracted from the logits of tokens that were generated before.
        frequency_penalty: What is subtracted from them for each time that they were.
        repetition_penalty: What positive logits of tokens of the prompt and of the text are divided by, and negative
            ones multiplied with; 1 changes nothing.
        bias: (token, value) pairs; each value is added to the token's logit.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < inf and self.top_k >= 0 and 0 < self.top_p <= 1 and 0 <= self.min_p <= 1):
            what = f"temperature {self.temperature}, top-k {self.top_k}, top-p {self.top_p}, min-p {self.min_p}"
            next_step = "expected temperature >= 0, top-k >= 0, 0 < top-p <= 1, 0 <= min-p <= 1"
            raise H1ExportError("sampling", what, next_step)
        added = (self.presence_penalty, self.frequency_penalty, *(value for _, value in self.bias))
        if not (all(map(isfinite, added)) and 0 < self.repetition_penalty < inf):
            what = "a penalty or a bias that is not finite, or a repetition penalty that is not positive"
            raise H1ExportError("sampling", what, "give finite numbers; a repetition penalty of 1 changes nothing")

    def choose(self, logits: Array, rng: np.random.Generator) -> int:
        """Choose the next token by its logits [vocab]; the penalties are ``Sampler``'s.

        Raises:
            H1ExportError: A logit is no number, or every token is excluded.
        """
        likeliest = int(logits.argmax())  # of a NaN, where there is one
        if not isfinite(logits[likeliest]):
            what = f"that of token {likeliest}, the largest, is {logits[likeliest]}"
            raise H1ExportError("logits", what, "check the artifact: h1export validate")
        if self.temperature == 0:
            return likeliest
        scaled = logits.astype(np.float64) / self.temperature
        order = np.argsort(-scaled, kind="stable")[: self.top_k or len(scaled)]
        probabilities = np.exp(scaled[order] - scaled[order[0]])
        probabilities /= probabilities.sum()
        kept = int(np.searchsorted(np.cumsum(probabilities), self.top_p)) + 1
        if self.min_p:
            kept = min(kept, int((probabilities >= self.min_p * probabilities[0]).sum()))
        probabilities = probabilities[:kept] / probabilities[:kept].sum()
        return int(order[rng.choice(len(probabilities), p=probabilities)])


class Sampler:
    """Chooses the tokens of one sequence, and remembers them for the penalties.

    Args:
        sampling: How tokens are chosen.
        prompt: The tokens before the first one.
        rng: The source of random choices; None means a new one with the seed of ``sampling``.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = (), rng: np.random.Generator | None = None) -> None:
        self._sampling = sampling
        self._rng = np.random.default_rng(sampling.seed) if rng is None else rng
        self._prompt = frozenset(prompt) if sampling.repetition_penalty != 1 else frozenset()
        self._counts: Counter[int] = Counter()

    def choose(self, logits: Array, allowed: npt.NDArray[np.bool_] | None = None) -> int:
        """Choose the next token by its logits [vocab], among the tokens that ``allowed`` [vocab] has, if given.

        ``logits`` stay as they are.
        """
        logits = self._changed(logits)
        if allowed is not None:
            logits = np.where(allowed, logits, -np.inf)
        token = self._sampling.choose(logits, self._rng)
        self._counts[token] += 1
        return token

    def _changed(self, logits: Array) -> Array:
        how = self._sampling
        seen = np.array(list(self._counts), np.int64)
        changed = logits.astype(np.float32) if len(seen) or self._prompt or how.bias else logits  # a copy
        if how.repetition_penalty != 1 and (tokens := sorted(self._prompt | set(self._counts))):
            part = changed[tokens]
            changed[tokens] = np.where(part > 0, part / how.repetition_penalty, part * how.repetition_penalty)
        if len(seen) and (how.presence_penalty or how.frequency_penalty):
            counts = np.array(list(self._counts.values()), np.float32)
            changed[seen] -= how.presence_penalty + how.frequency_penalty * counts
        for token, value in how.bias:
            changed[token] += value
        return changed


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
    sampler = Sampler(sampling, prompt.tolist())
    session = runner.start(1, capacity=min(len(prompt) + max_tokens, context))
    for start, end in calls(0, len(prompt)):
        logits = session.append(prompt[None, start:end], keep=1)
    yield from new_tokens(
        logits[0, -1],
        lambda token: session.append(np.array([[token]]))[0, -1],
        min(max_tokens, context - len(prompt)),
        choose=sampler.choose,
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
