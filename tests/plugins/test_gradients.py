"""Gradients of the h1 ops are those of their references, whatever inputs are differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from h1export.plugins import attention, causal_conv, gradients, ssm_scan
from h1export.plugins.attention.op import composed
from h1export.plugins.causal_conv.op import reference as conv_reference
from h1export.plugins.ssm_scan.op import reference as scan_reference


def values(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ONES = torch.ones(2, 9)
POSITIONS = torch.arange(9).expand(2, 9)
CASES: dict[str, tuple[Any, Callable[..., Any], tuple[Any, ...]]] = {
    "scan": (
        ssm_scan,
        scan_reference,
        (
            *(values(2, 9, 4, 3, seed=0), values(2, 9, 4, seed=1), -values(4, seed=2).exp()),
            *(values(2, 9, 2, 5, seed=3), values(2, 9, 2, 5, seed=4), values(4, seed=5), values(4, seed=6)),
            *(values(2, 4, 3, 5, seed=7), ONES, 4, 0.0, float("inf")),
        ),
    ),
    "conv": (
        causal_conv,
        conv_reference,
        (values(2, 9, 6, seed=0), values(2, 6, 3, seed=1), values(6, 1, 4, seed=2), values(6, seed=3)),
    ),
    "conv without bias": (
        causal_conv,
        conv_reference,
        (values(2, 9, 6, seed=0), values(2, 6, 3, seed=1), values(6, 1, 4, seed=2), None),
    ),
    "attention": (
        attention,
        composed,
        (
            *(values(2, 9, 4, 8, seed=0), values(2, 9, 2, 8, seed=1), values(2, 9, 2, 8, seed=2)),
            *(torch.zeros(2, 2, 0, 8), torch.zeros(2, 2, 0, 8), POSITIONS, ONES.long(), 1e4),
        ),
    ),
}


def differentiated(function: Callable[..., Any], inputs: tuple[Any, ...], chosen: set[int]) -> list[torch.Tensor]:
    given = [one.clone().requires_grad_() if place in chosen else one for place, one in enumerate(inputs)]
    output = function(*given)[0]
    weights = values(*output.shape, seed=9)
    return list(torch.autograd.grad((output * weights).sum(), [given[place] for place in sorted(chosen)]))


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("alone", [False, True], ids=["all", "first"])
def test_gradients_are_those_of_the_reference(name: str, alone: bool) -> None:
    gradients.register()
    op, reference, inputs = CASES[name]
    # a state that is empty, and the output of a state, are no part of the gradient
    floats = {
        place
        for place, one in enumerate(inputs)
        if isinstance(one, torch.Tensor) and one.is_floating_point() and one.numel() and one is not ONES
    }
    chosen = {0} if alone else floats
    for mine, right in zip(differentiated(op, inputs, chosen), differentiated(reference, inputs, chosen), strict=True):
        assert right.abs().max() > 0
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-6)
