"""Groups of the head's rows: tokens that are likely in similar positions share second moments.

To second order, the KL divergence of softmax outputs is half the sum over tokens v of p_v (1 - p_v) e_v^2, cross terms
left out, where e_v is the error of the token's logit. So an error matters where the token has some probability, and the
moments for a row of the head weigh each position by p_v (1 - p_v). Moments of its own for every row would be too much
work. The steps:

1. For every row, sum the weighted inputs of the head over all positions, projected to SKETCH random dimensions.
2. Group the rows by k-means of the directions of these sums.
3. For every group and position, take the mean of its rows' weights, after each row's weights are scaled to sum to one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from h1export.artifact.weight_file import in_order
from h1export.quantize.methods.moments import InputPair

GROUPS = 64  # the largest number of groups
ROWS_A_GROUP = 32  # the least average number of rows in a group
SKETCH = 64  # dimensions of the random projection
ROUNDS = 12  # of k-means
SEED = 0
POSITIONS = 128  # positions of which a thread holds the probabilities at a time

HeadInputs = Callable[[], Iterator[Callable[[], InputPair]]]  # starts over all sequences, and yields a call for each


@dataclass(frozen=True)
class HeadGroups:
    """The groups of the head's rows, and what each group makes of the positions of the calibration text.

    Attributes:
        groups: int64 [vocab] on the CPU, the group of each row.
        weights: float32 [groups, samples, length] where the head is, the weight of each position; the weights of a
            group sum to one.
    """

    groups: Tensor
    weights: Tensor


def group_head(inputs: HeadInputs, head: Tensor, multiplier: float, *, jobs: int) -> HeadGroups:
    """Returns groups of the rows of ``head`` [vocab, columns], whose outputs times ``multiplier`` are logits.

    Outputs are computed in the dtype of ``head``, float32 or bf16.

    No digit depends on ``jobs``, the number of threads.
    """
    generator = torch.Generator().manual_seed(SEED)
    projection = torch.randn(head.shape[1], SKETCH, generator=generator).to(head.device)
    sketches = torch.zeros(len(head), SKETCH, device=head.device)
    weight_sums = torch.zeros(len(head), device=head.device)
    calls = (partial(_sketch, pair, head, multiplier, projection=projection) for pair in inputs())
    for sketch, sums in in_order(calls, jobs):
        sketches += sketch
        weight_sums += sums
    # index_add_ of a GPU sums in an order of its own
    groups = _cluster(sketches.cpu(), max(1, min(GROUPS, len(head) // ROWS_A_GROUP)), generator)
    members = torch.nn.functional.one_hot(groups).float().to(head.device)
    share = members / (weight_sums.clamp_min(torch.finfo(torch.float32).tiny)[:, None] * members.sum(0))
    found = in_order((partial(_group_weights, pair, head, multiplier, share=share) for pair in inputs()), jobs)
    return HeadGroups(groups, torch.stack(list(found)).permute(2, 0, 1).contiguous())


def _sketch(
    pair: Callable[[], InputPair], head: Tensor, multiplier: float, *, projection: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns two sums over the positions of a sequence for every row of the head.

    They are the weighted projected inputs [vocab, SKETCH], and the weights [vocab].
    """
    float_input, quantised_input = pair()
    sketch = torch.zeros(len(head), SKETCH, device=head.device)
    sums = torch.zeros(len(head), device=head.device)
    for start in range(0, len(quantised_input), POSITIONS):
        weights = _variances(float_input[start : start + POSITIONS], head, multiplier)
        sketch += weights.T @ (quantised_input[start : start + POSITIONS] @ projection)
        sums += weights.sum(0)
    return sketch, sums


def _group_weights(pair: Callable[[], InputPair], head: Tensor, multiplier: float, *, share: Tensor) -> Tensor:
    """Returns the weights of a sequence's positions for every group [length, groups].

    ``share`` [vocab, groups] is the factor with which a row's weights enter the mean of its group, and 0 elsewhere.
    """
    float_input, _ = pair()
    blocks = [float_input[start : start + POSITIONS] for start in range(0, len(float_input), POSITIONS)]
    return torch.cat([_variances(block, head, multiplier) @ share for block in blocks])


def _variances(float_input: Tensor, head: Tensor, multiplier: float) -> Tensor:
    """Returns p (1 - p) of every token at every position [positions, vocab]."""
    probabilities = torch.softmax(multiplier * (float_input.to(head.dtype) @ head.T).float(), dim=1)
    return probabilities * (1 - probabilities)


def _cluster(sketches: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Returns the cluster of each row, int64 [rows] below ``count``, by k-means of the rows' directions.

    No cluster is empty.
    """
    directions = torch.nn.functional.normalize(sketches, dim=1)
    centres = directions[torch.randperm(len(directions), generator=generator)[:count]].clone()
    nearest = torch.zeros(len(directions), dtype=torch.int64)
    for _ in range(ROUNDS):
        nearest = torch.argmax(directions @ centres.T, dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, directions)
        centres = torch.nn.functional.normalize(sums, dim=1)
    numbered: Tensor = torch.unique(nearest, return_inverse=True)[1]
    return numbered
