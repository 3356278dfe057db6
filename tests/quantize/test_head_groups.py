"""Groups of the head's rows, and the weights of positions for each, against the definition in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from h1export.quantize.methods.head_groups import GROUPS, ROWS_A_GROUP, HeadGroups, group_head

Pairs = list[tuple[Tensor, Tensor]]


def problem(vocab: int, samples: int, seed: int) -> tuple[Tensor, Pairs]:
    """A head [vocab, 24], and the pairs of inputs of some sequences, longer than what a thread holds at a time."""
    generator = torch.Generator().manual_seed(seed)
    rights = [torch.randn(150, 24, generator=generator) for _ in range(samples)]
    return torch.randn(vocab, 24, generator=generator), [
        (right, right + 0.1 * torch.randn(150, 24, generator=generator)) for right in rights
    ]


def of(pairs: Pairs, head: Tensor, multiplier: float, jobs: int = 1) -> HeadGroups:
    def inputs() -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
        return (partial(lambda pair: pair, pair) for pair in pairs)

    return group_head(inputs, head, multiplier, jobs=jobs)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    vocab=st.integers(2, 200),
    samples=st.integers(1, 3),
    multiplier=st.sampled_from([0.05, 1.0, 3.0]),
    seed=st.integers(0, 1 << 30),
)
def test_weights_are_the_mean_variances_of_a_groups_tokens(
    vocab: int, samples: int, multiplier: float, seed: int
) -> None:
    head, pairs = problem(vocab, samples, seed)
    found = of(pairs, head, multiplier)
    probabilities = torch.softmax(
        multiplier * torch.stack([right for right, _ in pairs]).double() @ head.double().T, dim=-1
    )
    variances = probabilities * (1 - probabilities)  # [samples, length, vocab]
    shares = variances / variances.sum((0, 1))
    rounding = (
        2**-22 * probabilities / variances.sum((0, 1))
    )  # of 1 - p in float32, which is all of it where p is nearly 1
    assert found.groups.shape == (vocab,)
    assert sorted(set(found.groups.tolist())) == list(range(len(found.weights)))  # none is empty
    assert len(found.weights) <= max(1, min(GROUPS, vocab // ROWS_A_GROUP))
    for group, weights in enumerate(found.weights):
        expected = shares[..., found.groups == group].mean(-1)
        assert ((weights - expected).abs() <= 1e-3 * expected + rounding[..., found.groups == group].mean(-1)).all()


def test_tokens_of_like_contexts_come_together() -> None:
    """Two kinds of positions, and tokens that are likely in one kind each."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, 24, generator=generator)
    rights = [
        4 * kinds[torch.randint(0, 2, (200,), generator=generator)] + torch.randn(200, 24, generator=generator)
        for _ in range(2)
    ]
    belongs = torch.randint(0, 2, (2 * ROWS_A_GROUP,), generator=generator)
    head = kinds[belongs] + 0.1 * torch.randn(len(belongs), 24, generator=generator)
    found = of([(right, right) for right in rights], head, 0.2)
    assert len(found.weights) == 2
    same = found.groups == belongs
    assert same.all() or not same.any()


def test_threads_change_no_digit() -> None:
    head, pairs = problem(180, 3, 1)
    one = of(pairs, head, 1.0)
    other = of(pairs, head, 1.0, jobs=3)
    assert torch.equal(one.groups, other.groups)
    assert torch.equal(one.weights, other.weights)


@pytest.mark.parametrize("size", [1e3, 1e-30])
def test_tokens_that_are_certain_or_all_alike(size: float) -> None:
    """No position has any weight where one token always comes; that is no reason for numbers that are none."""
    head, pairs = problem(96, 1, 2)
    found = of(pairs, head, size)
    assert torch.isfinite(found.weights).all()
