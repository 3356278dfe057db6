"""The head's rows in groups, by the contexts in which their tokens are likely.

An error e_v of a token's logit matters where the token has some probability: to second order the KL divergence of softmax outputs is half
the sum over tokens v of p_v (1 - p_v) e_v^2, cross terms left out. So a row's moments weigh each position by p (1 - p), and rows whose
tokens come in like contexts share them. Contexts are compared by a random projection of their mean, which k-means puts into groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from h1export.artifact.weight_file import in_order

# at most so many groups, and on average not fewer rows in each
GROUPS = 64
ROWS_A_GROUP = 32
# of contexts: dimensions; of k-means
SKETCH = 64
ROUNDS = 12
SEED = 0
POSITIONS = 128  # whose probabilities a thread holds at a time

# a position's input of the head, as the checkpoint's model has it and as it comes: two of [length, columns], a sequence a call
Inputs = Callable[[], Iterator[Callable[[], tuple[Tensor, Tensor]]]]


@dataclass(frozen=True)
class HeadGroups:
    """Attributes:
    groups: int64 [vocab], of each row.
    weights: float32 [groups, samples, length], of each position: the mean over the group's rows, each of which has a sum of 1.
    """

    groups: Tensor
    weights: Tensor


def contexts(inputs: Inputs, head: Tensor, multiplier: float, jobs: int) -> HeadGroups:
    """Of the rows of ``head``, float32 [vocab, columns], whose outputs times ``multiplier`` are logits. No digit depends on ``jobs``."""
    generator = torch.Generator().manual_seed(SEED)
    projection = torch.randn(head.shape[1], SKETCH, generator=generator)
    sketch = torch.zeros(len(head), SKETCH)
    mass = torch.zeros(len(head))
    for means, sums in in_order(
        (partial(_sketch, pair, head, multiplier, projection=projection) for pair in inputs()), jobs
    ):
        sketch += means
        mass += sums
    groups = _nearby(sketch, max(1, min(GROUPS, len(head) // ROWS_A_GROUP)), generator)
    members = torch.nn.functional.one_hot(groups).float()
    share = members / (mass.clamp_min(torch.finfo(torch.float32).tiny)[:, None] * members.sum(0))
    found = in_order((partial(_weights, pair, head, multiplier, share=share) for pair in inputs()), jobs)
    return HeadGroups(groups, torch.stack(list(found)).permute(2, 0, 1).contiguous())


def _sketch(
    pair: Callable[[], tuple[Tensor, Tensor]], head: Tensor, multiplier: float, *, projection: Tensor
) -> tuple[Tensor, Tensor]:
    """Of one sequence: the sums over its positions of a row's weights times the projected inputs [vocab, SKETCH], and of the weights."""
    right, found = pair()
    means = torch.zeros(len(head), SKETCH)
    sums = torch.zeros(len(head))
    for start in range(0, len(found), POSITIONS):
        weights = _variances(right[start : start + POSITIONS], head, multiplier)
        means += weights.T @ (found[start : start + POSITIONS] @ projection)
        sums += weights.sum(0)
    return means, sums


def _weights(pair: Callable[[], tuple[Tensor, Tensor]], head: Tensor, multiplier: float, share: Tensor) -> Tensor:
    """Of one sequence's positions for each group [length, groups]."""
    right, _ = pair()
    return torch.cat(
        [
            _variances(right[start : start + POSITIONS], head, multiplier) @ share
            for start in range(0, len(right), POSITIONS)
        ]
    )


def _variances(right: Tensor, head: Tensor, multiplier: float) -> Tensor:
    """p (1 - p) of every token [positions, vocab]."""
    probabilities = torch.softmax(multiplier * (right @ head.T), dim=1)
    return probabilities * (1 - probabilities)


def _nearby(sketch: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means of the rows' directions: int64 [rows], below ``count``; none of these is empty."""
    directions = torch.nn.functional.normalize(sketch, dim=1)
    centres = directions[torch.randperm(len(directions), generator=generator)[:count]].clone()
    nearest = torch.zeros(len(directions), dtype=torch.int64)
    for _ in range(ROUNDS):
        nearest = torch.argmax(directions @ centres.T, dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, directions)
        centres = torch.nn.functional.normalize(sums, dim=1)
    numbered: Tensor = torch.unique(nearest, return_inverse=True)[1]
    return numbered
