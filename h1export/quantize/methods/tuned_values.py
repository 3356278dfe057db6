"""What a step tunes of a tensor, and how its gradient moves it: codes by ``round``, scales by ``scales``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from h1export.model.falcon_h1.states import Array
from h1export.quantize.choices import Step
from h1export.quantize.quantized_tensor import MAX_SCALE, MIN_SCALE, QuantizedTensor

STEPS: Mapping[Step, int] = {"round": 60, "scales": 60}  # updates of a step
RATES: Mapping[Step, float] = {"round": 0.004, "scales": 0.003}  # codes, and the logarithm of a scale, by an update
WARMUP = 10  # updates until the rate is whole; then it falls to zero
FIRST, SECOND = 0.9, 0.95  # shares that a mean of gradients, and of their squares, keeps in an update
INSIDE = 0.49  # the farthest from its code that a value begins
TINY = 1e-12


def rate(step: Step, update: int) -> float:
    """Returns the rate of an update, counted from 0."""
    return RATES[step] * min(1.0, (update + 1) / WARMUP) * (1 - update / STEPS[step])


class Values(Protocol):
    """The values of one tensor that a step tunes.

    Attributes:
        state: what a step that goes on after a kill needs, by name.
    """

    state: dict[str, Tensor]

    def integers(self) -> QuantizedTensor:
        """Returns the integers that the values stand for."""
        ...

    def update(self, gradient: Tensor, number: int) -> None:
        """Move the values by the ``gradient`` [rows, columns] of the dequantised weight; updates count from 0."""
        ...


def adam(state: dict[str, Tensor], gradient: Tensor, step: Step, *, number: int) -> None:
    """Move ``state["value"]`` by its ``gradient``; "mean" and "square" are those of the gradients so far.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2014. A gradient whose sign changes from batch
    to batch moves a value little, other than by its sign alone: on 19,000 tokens that moved codes at random.
    """
    mean, square = state["mean"], state["square"]
    mean.mul_(FIRST).add_(gradient, alpha=1 - FIRST)
    square.mul_(SECOND).addcmul_(gradient, gradient, value=1 - SECOND)
    size = (square / (1 - SECOND ** (number + 1))).sqrt_().add_(TINY)
    state["value"].addcdiv_(mean / (1 - FIRST ** (number + 1)), size, value=-rate(step, number))


def beginning(value: Tensor) -> dict[str, Tensor]:
    """Returns the state of ``value`` before the first update."""
    return {"value": value, "mean": torch.zeros_like(value), "square": torch.zeros_like(value)}


@dataclass
class ScaleValues:
    """Logarithms of scales, [rows, groups]; codes are fixed."""

    codes: Tensor
    state: dict[str, Tensor]

    @classmethod
    def of(cls, before: QuantizedTensor) -> ScaleValues:
        """Returns the values that stand for ``before``."""
        value = torch.from_numpy(before.scales.astype(np.float32)).log()
        return cls(torch.from_numpy(before.codes), beginning(value))

    def integers(self) -> QuantizedTensor:
        scales = self.state["value"].exp().clamp(MIN_SCALE, MAX_SCALE).half().numpy()
        return QuantizedTensor(self.codes.numpy(), scales, np.ones(len(scales), np.float32))

    def update(self, gradient: Tensor, number: int) -> None:
        scales = self.state["value"].exp()
        adam(self.state, (gradient * self.codes).reshape(*scales.shape, -1).sum(2) * scales, "scales", number=number)


@dataclass
class CodeValues:
    """What codes are rounded from, [rows, columns]; scales are fixed. A gradient passes through the rounding unchanged.

    Source: Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", 2023
    (AutoRound), with the divergence of predictions in place of a block's error, and Adam in place of the sign.
    """

    scales: Tensor
    top: int
    state: dict[str, Tensor]

    @classmethod
    def of(cls, before: QuantizedTensor, weight: Array, top: int) -> CodeValues:
        """Returns the values that stand for ``before``: each as near to ``weight`` as its code allows."""
        scales = torch.from_numpy(before.scales.astype(np.float32))
        codes = torch.from_numpy(before.codes).float()
        wanted = (torch.from_numpy(weight).reshape(*scales.shape, -1) / scales[..., None]).reshape(codes.shape)
        return cls(scales, top, beginning(codes + (wanted - codes).clamp_(-INSIDE, INSIDE)))

    def integers(self) -> QuantizedTensor:
        codes = self.state["value"].round().clamp_(-self.top, self.top).to(torch.int8).numpy()
        return QuantizedTensor(codes, self.scales.half().numpy(), np.ones(len(codes), np.float32))

    def update(self, gradient: Tensor, number: int) -> None:
        scaled = (gradient.reshape(*self.scales.shape, -1) * self.scales[..., None]).reshape(gradient.shape)
        adam(self.state, scaled, "round", number=number)
        self.state["value"].clamp_(-self.top - INSIDE, self.top + INSIDE)
