"""Gradients of the h1 ops: the backward pass computes an op's reference again, and differentiates that.

So an op saves its inputs only, and its gradient is that of op.py, whatever kernel has computed the op.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from h1export.plugins.attention import op as attention
from h1export.plugins.causal_conv import op as causal_conv
from h1export.plugins.ssm_scan import op as ssm_scan

Reference = Callable[..., tuple[Tensor, ...]]


@cache
def register() -> None:
    """Give every op its gradient; calls after the first do nothing."""
    for op, reference in (
        (attention.attention, attention.composed),
        (causal_conv.causal_conv, causal_conv.reference),
        (ssm_scan.ssm_scan, ssm_scan.reference),
    ):
        op.register_autograd(partial(_backward, reference), setup_context=_keep)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the inputs of an op for its backward pass."""
    del output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]


def _backward(reference: Reference, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradient of each input; None for one that is no floating-point tensor."""
    inputs = [
        other if saved is None else saved.detach().requires_grad_(saved.is_floating_point())
        for saved, other in zip(ctx.saved_tensors, ctx.others, strict=True)
    ]
    with torch.enable_grad():
        outputs = reference(*inputs)
    known = [(value, one) for value, one in zip(outputs, gradients, strict=True) if one is not None]
    wanted = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    found = iter(
        torch.autograd.grad([value for value, _ in known], wanted, [one for _, one in known], allow_unused=True)
    )
    return tuple(next(found) if isinstance(value, Tensor) and value.requires_grad else None for value in inputs)
