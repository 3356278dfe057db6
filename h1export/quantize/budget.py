"""Which tensors to keep in more bits, when not all can have them: the most sensitive for their size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from h1export.errors import H1ExportError
from h1export.quantize.precision import INT8, Precision


@dataclass(frozen=True)
class Sensitivity:
    """The cost of storing one tensor alone in few bits.

    Attributes:
        shape: rows and columns of the tensor.
        low: the precision that was measured.
        kl: the mean KL divergence from the full model's predictions, in nats per token.
    """

    shape: tuple[int, int]
    low: Precision
    kl: float

    def bits(self, precision: Precision) -> int:
        """Returns the bits of the tensor's codes and scales in ``precision``."""
        return precision.stored_bits(self.shape)


def bits_per_weight(found: Mapping[str, Sensitivity], raised: Mapping[str, Precision]) -> float:
    """Returns the mean bits of a weight, scales included; tensors in ``raised`` have that precision, others ``low``."""
    bits = sum(tensor.bits(raised.get(name, tensor.low)) for name, tensor in found.items())
    return bits / sum(tensor.shape[0] * tensor.shape[1] for tensor in found.values())


def within_bits(found: Mapping[str, Sensitivity], high: Precision, budget: float) -> dict[str, Precision]:
    """Returns the tensors to raise to ``high``, so that all together have at most ``budget`` bits a weight.

    Tensors are taken by the divergence that a bit saves, the largest first. One that does not fit is passed over.
    """
    raised: dict[str, Precision] = {}
    for name in _by_gain(found, high):
        if bits_per_weight(found, {**raised, name: high}) <= budget:
            raised[name] = high
    return raised


def within_kl(found: Mapping[str, Sensitivity], high: Precision, budget: float) -> dict[str, Precision]:
    """Returns the tensors to raise to ``high``, so that the divergences of all others sum up to at most ``budget``.

    It is an approximation that ``high`` loses nothing and that divergences add up: validate judges the artifact.
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
class Step:
    """One tensor that is raised, after those of the steps before.

    Attributes:
        tensor: its name.
        bits: mean bits of a weight after the step, scales included.
        kl: the sum of the divergences of the tensors that are left, in nats per token.
    """

    tensor: str
    bits: float
    kl: float


def steps(found: Mapping[str, Sensitivity], high: Precision = INT8) -> list[Step]:
    """Returns all tensors in the order in which a budget raises them, with what each step costs and leaves."""
    order = _by_gain(found, high)
    return [
        Step(
            name,
            bits=bits_per_weight(found, dict.fromkeys(order[: place + 1], high)),
            kl=sum(found[left].kl for left in order[place + 1 :]),
        )
        for place, name in enumerate(order)
    ]


@dataclass(frozen=True)
class Budget:
    """A limit on the size of the weights or on the loss of accuracy, one of the two.

    Attributes:
        bits: mean bits of a weight at most, scales included.
        kl: sum of KL divergences in nats at most.

    Raises:
        H1ExportError: a value that is not a positive finite number.
    """

    bits: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        for option, value in (("--budget-bits", self.bits), ("--budget-kl", self.kl)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise H1ExportError(option, f"{value} is not a budget", "give a positive number")

    def raised(self, found: Mapping[str, Sensitivity]) -> dict[str, Precision]:
        """Returns the tensors to raise to int8 within this budget.

        Raises:
            H1ExportError: fewer bits than all tensors need at their low precisions.
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
