"""Choice: one text that is being generated, token by token, with what ends it and what is said about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from h1export.checkpoint.tokenizer import TokenDecoder
from h1export.model.falcon_h1.states import Array
from h1export.runtime.generation import Sampler

STOP, LENGTH = "stop", "length"


@dataclass(frozen=True)
class Scored:
    """A token and its log probability, with those of the likeliest tokens at its place, likeliest first.

    ``logprob`` is None for the first token of a prompt, which nothing predicts.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """A token of choice ``index``: the text that is whole with it, which may be none, and its score if asked for."""

    index: int
    text: str
    scored: Scored | None = None


@dataclass(frozen=True)
class Started:
    """The prompt of some choices was computed: how many of its tokens were reused, and its scores if asked for."""

    index: int
    tokens: int
    reused: int
    scored: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class Ended:
    """The end of choice ``index``: the text that was held back, and why it ends, "stop" or "length"."""

    index: int
    text: str
    reason: str


@dataclass(frozen=True)
class Failed:
    """An error, after which nothing follows."""

    error: BaseException


Event = Piece | Started | Ended | Failed
Emit = Callable[[Event], None]


class Grammar(Protocol):
    """What restricts the tokens of a text."""

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Return which tokens may be next, bool [vocab]."""
        ...

    def take(self, token: int) -> bool:
        """Go on by ``token``, and return whether the text is complete and nothing can follow."""
        ...


class Choice:
    """One text, whose events go to ``emit`` as they happen.

    Args:
        index: The number of the choice in the answer.
        sampler: Chooses the tokens.
        decoder: Gives their text.
        end: Tokens that end the text and are no part of it.
        most: The most tokens.
        stops: Texts that end it and are no part of it.
        top: The number of likeliest tokens that each score has; None means that tokens have no scores.
        grammar: What restricts the tokens, or None.
        emit: Is called in the scheduler's thread.
    """

    def __init__(
        self,
        index: int,
        sampler: Sampler,
        decoder: TokenDecoder,
        *,
        end: frozenset[int],
        most: int,
        emit: Emit,
        stops: Sequence[str] = (),
        top: int | None = None,
        grammar: Grammar | None = None,
    ) -> None:
        self.index = index
        self.emit = emit
        self._sampler = sampler
        self._decoder = decoder
        self._end = end
        self._left = most
        self._stops = stops
        self._top = top
        self._grammar = grammar
        self._held = ""  # the end of the text, with which a stop may begin

    def take(self, logits: Array) -> int | None:
        """Choose a token by the logits after the tokens so far [vocab], and return it; None where the text ends."""
        if self._left == 0:
            return self._finished(LENGTH)
        token = self._sampler.choose(logits, None if self._grammar is None else self._grammar.allowed())
        if token in self._end:
            return self._finished(STOP)
        self._left -= 1
        complete = self._grammar is not None and self._grammar.take(token)
        text, stopped = self._until_stop(self._decoder.step(token))
        self.emit(Piece(self.index, text, None if self._top is None else score(logits, token, self._top)))
        if stopped:
            self.emit(Ended(self.index, "", STOP))
            return None
        if complete:
            return self._finished(STOP)
        return token if self._left else self._finished(LENGTH)

    def _finished(self, reason: str) -> int | None:
        """End the text, and return None, which is no token."""
        text, stopped = self._until_stop(self._decoder.rest())
        self.emit(Ended(self.index, text if stopped else text + self._held, STOP if stopped else reason))
        return None

    def _until_stop(self, more: str) -> tuple[str, bool]:
        """Return what can be given of the text with ``more``, and whether a stop has ended it."""
        text = self._held + more
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self._held = ""
            return text[: min(places)], True
        longest = max(
            (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest], False


def score(logits: Array, token: int, top: int) -> Scored:
    """Return the log probability of ``token`` by logits [vocab], before any sampling, and the ``top`` likeliest."""
    exact = logits.astype(np.float64)
    logarithms = exact - exact.max()
    logarithms -= np.log(np.exp(logarithms).sum())
    likeliest = np.argsort(-logarithms, kind="stable")[:top].tolist() if top else []
    return Scored(token, float(logarithms[token]), tuple((one, float(logarithms[one])) for one in likeliest))
