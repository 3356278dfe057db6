"""The guard: integers that a method has solved on a text are kept only where they beat plain rounding on another text.

A solver that sees a few sequences can fit them and be worse elsewhere. So the last sequences of the calibration text
are held out: no solver sees them. On these, the solved integers of a projection and those of plain rounding are
compared by the error that they leave in its outputs, and those of the head by the KL divergence of the predictions.
Where the solved ones are worse, the plain ones are stored, and the manifest names the tensor with both errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from h1export.model.falcon_h1.states import Array
from h1export.quantize.choices import Step
from h1export.quantize.methods.head_groups import POSITIONS
from h1export.quantize.methods.moments import InputPair

SHARE = 20  # sequences of the calibration text for one that is held out
GUARD = "guard"  # the key of a manifest's calibration
DIGITS = 5  # of an error in the manifest

ERRORS = 2
Errors = npt.NDArray[np.float64]  # [ERRORS]: that of the solved integers, and that of the plain ones


def held_out(sequences: int) -> int:
    """Returns how many sequences of a calibration text are held out; none of a single one."""
    return min(sequences - 1, max(1, sequences // SHARE))


def output_errors(weight: Array, candidates: Sequence[Array], inputs: Sequence[InputPair]) -> Errors:
    """Returns the squared error that each of ``candidates`` leaves in a projection's outputs, float64 [candidates].

    What ``weight`` [rows, columns] gives on the float inputs is right, and a candidate meets the quantised inputs.
    """
    found = np.zeros(len(candidates))
    for float_input, quantised_input in inputs:
        right = float_input @ _on(weight, float_input).T
        for place, candidate in enumerate(candidates):
            error = quantised_input @ _on(candidate, quantised_input).T - right
            found[place] += float(error.square().sum(dtype=torch.float64))
    return found


def divergence(inputs: Sequence[InputPair], head: Tensor, candidate: Tensor, *, multiplier: float) -> float:
    """Returns the sum of KL(right || candidate) over the positions of ``inputs``, in nats.

    ``head`` and ``candidate`` are [vocab, columns], and their outputs times ``multiplier`` are logits.
    """
    total = 0.0
    for pair in inputs:
        for start in range(0, len(pair[0]), POSITIONS):
            right, found = (
                torch.log_softmax(multiplier * (values[start : start + POSITIONS] @ weight.T), dim=1)
                for values, weight in zip(pair, (head, candidate), strict=True)
            )
            total += float((right.exp() * (right - found)).sum(dtype=torch.float64))
    return total


def is_worse(errors: Errors) -> bool:
    """Returns whether the solved integers are to be dropped; errors that are no numbers are worse than any."""
    return not errors[0] <= errors[1]


@dataclass(frozen=True)
class GuardRecord:
    """What the guard has found.

    Attributes:
        sequences: how many sequences were held out.
        plain: tensor -> the errors of its solved and its plain integers, where the plain ones were kept.
        steps: step -> the divergences after and before it; a step that has not lowered it was dropped.
    """

    sequences: int
    plain: Mapping[str, Errors] = field(default_factory=dict)
    steps: Mapping[Step, Errors] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """Returns the record for the manifest."""
        plain = {
            name: {"solved": _rounded(errors[0]), "plain": _rounded(errors[1])} for name, errors in self.plain.items()
        }
        steps = {
            step: {"after": _rounded(errors[0]), "before": _rounded(errors[1]), "kept": not is_worse(errors)}
            for step, errors in self.steps.items()
        }
        return {"sequences": self.sequences, "plain": plain} | ({"steps": steps} if steps else {})


def _rounded(error: float) -> float | None:
    """Returns ``error`` in DIGITS significant digits; None where it is no finite number, which JSON cannot hold."""
    return float(f"{error:.{DIGITS}g}") if np.isfinite(error) else None


def _on(weight: Array, like: Tensor) -> Tensor:
    return torch.from_numpy(weight).to(like.device)
