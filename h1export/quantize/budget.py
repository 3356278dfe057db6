"""Which tensors to keep in more bits, when not all can have them: the most sensitive for their size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from h1export.errors import H1ExportError
from h1export.quantize.precision import INT8, Precision

SCALE_BITS = 16


@dataclass(frozen=True)
class Sensitivity:
    """Of one tensor: the mean KL divergence from the full model, in nats, when it alone is stored in ``low``.

    Attributes:
        shape: of the tensor.
        low: the precision it is measured in.
        kl: the divergence.
    """

    shape: tuple[int, int]
    low: Precision
    kl: float

    def bits(self, precision: Precision) -> int:
        """Of codes and scales."""
        rows, columns = self.shape
        return rows * columns * precision.bits + SCALE_BITS * rows * columns // precision.columns_per_group(columns)


def bits_per_weight(found: Mapping[str, Sensitivity], raised: Mapping[str, Precision]) -> float:
    """Codes and scales over all weights, where those ``raised`` have other precisions than their low ones."""
    bits = sum(tensor.bits(raised.get(name, tensor.low)) for name, tensor in found.items())
    return bits / sum(tensor.shape[0] * tensor.shape[1] for tensor in found.values())


def within_bits(found: Mapping[str, Sensitivity], high: Precision, budget: float) -> dict[str, Precision]:
    """The tensors to be raised to ``high``, so that all together have at most ``budget`` bits a weight.

    Taken by divergence saved for a bit, the largest first; one that does not fit is passed over.
    """
    raised: dict[str, Precision] = {}
    for name in _by_gain(found, high):
        if bits_per_weight(found, {**raised, name: high}) <= budget:
            raised[name] = high
    return raised


def within_kl(found: Mapping[str, Sensitivity], high: Precision, budget: float) -> dict[str, Precision]:
    """The tensors to be raised to ``high``, so that the divergences of those that are not sum up to at most ``budget``.

    That ``high`` loses nothing and that divergences add up are approximations: the plan is judged by validate.
    """
    raised: dict[str, Precision] = {}
    left = sum(tensor.kl for tensor in found.values())
    for name in _by_gain(found, high):
        if left <= budget:
            break
        raised[name] = high
        left = left - found[name].kl
    return raised


@dataclass(frozen=True)
class Budget:
    """At most so many ``bits`` a weight, or so much divergence; one of the two.

    Raises:
        H1ExportError: not a budget.
    """

    bits: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        for option, value in (("--budget-bits", self.bits), ("--budget-kl", self.kl)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise H1ExportError(option, f"{value} is not a budget", "give a positive number")

    def raised(self, found: Mapping[str, Sensitivity]) -> dict[str, Precision]:
        """The tensors to be raised to int8.

        Raises:
            H1ExportError: less than all tensors need at their low precisions.
        """
        if self.bits is None:
            return within_kl(found, INT8, self.kl or 0.0)
        if (least := bits_per_weight(found, {})) > self.bits:
            raise H1ExportError(
                "--budget-bits",
                f"{self.bits:g} is less than the {least:.3f} of int4 alone",
                "give more, or a larger --group-size",
            )
        return within_bits(found, INT8, self.bits)


def _by_gain(found: Mapping[str, Sensitivity], high: Precision) -> list[str]:
    return sorted(
        found, key=lambda name: (-found[name].kl / (found[name].bits(high) - found[name].bits(found[name].low)), name)
    )
