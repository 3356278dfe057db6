"""Token by token from any Runner: greedy or sampled, reproducible by seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array, Ids
from h1export.runtime.runner import Runner

PREFILL_CHUNK = 512  # tokens of the prompt a call, so that logits of long prompts need no memory


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0: greedy.
        top_k: keep the k likeliest tokens; 0: all.
        top_p: keep the likeliest tokens up to this share of probability.
        seed: of the random choice.
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
        """The next token, given its logits [vocab]."""
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
    runner: Runner[Any], prompt: Ids, max_tokens: int, sampling: Sampling, eos: frozenset[int]
) -> Iterator[int]:
    """New tokens after ``prompt`` [seq], up to ``max_tokens``, an end token (not yielded) or the model's context.

    Raises:
        H1ExportError: an empty prompt, or one that fills the context.
    """
    context = runner.config.max_position_embeddings
    if not len(prompt):
        raise H1ExportError("prompt", "has no tokens", "give at least one")
    if len(prompt) >= context:
        raise H1ExportError("prompt", f"has {len(prompt)} tokens, and the model's context is {context}", "shorten it")
    rng = np.random.default_rng(sampling.seed)
    sequence = runner.start(1, capacity=min(len(prompt) + max_tokens, context))
    for start in range(0, len(prompt), PREFILL_CHUNK):
        logits = sequence.append(prompt[None, start : start + PREFILL_CHUNK])
    for left in reversed(range(min(max_tokens, context - len(prompt)))):
        token = sampling.choose(logits[0, -1], rng)
        if token in eos:
            return
        yield token
        if left:
            logits = sequence.append(np.array([[token]]))
