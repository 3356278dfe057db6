"""Second moments of a projection's inputs, from which GPTQ derives what an error of a weight does to its outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from h1export.quantize.device import CPU_DEVICE, ComputeDevice


@dataclass(frozen=True)
class Moments:
    """Sums over positions of a projection's quantised inputs x and float inputs t: float64 [columns, columns].

    Attributes:
        own: the sum of x x^T.
        drift: the sum of (t - x) x^T.
    """

    own: Tensor
    drift: Tensor

    @classmethod
    def zero(cls, columns: int, device: ComputeDevice = CPU_DEVICE) -> Moments:
        """Returns sums over no positions, on ``device``."""
        own, drift = (torch.zeros(columns, columns, dtype=torch.float64, device=device.place) for _ in range(2))
        return cls(own, drift)

    def add(self, float_input: Tensor, quantised_input: Tensor, weights: Tensor | None = None) -> None:
        """Add the positions of a sequence [length, columns], each multiplied by its weight in ``weights`` [length]."""
        weighted = quantised_input if weights is None else quantised_input * weights[:, None]
        self.own.add_(quantised_input.T @ weighted)
        self.drift.add_((float_input - quantised_input).T @ weighted)

    def mixed(self, other: Moments, share: float) -> Moments:
        """Returns these moments plus ``share`` of ``other``, after both are scaled to a mean diagonal of one."""
        size = float(self.own.diagonal().mean()) or 1.0
        other_size = float(other.own.diagonal().mean()) or 1.0
        return Moments(
            own=self.own / size + share / other_size * other.own,
            drift=self.drift / size + share / other_size * other.drift,
        )
