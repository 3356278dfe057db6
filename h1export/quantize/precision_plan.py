"""The plan file: a precision for every tensor, written from measured sensitivities, edited by hand, read by builds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from h1export import forms
from h1export.checkpoint.text_file import read_text
from h1export.errors import H1ExportError
from h1export.forms import Count
from h1export.quantize.budget import Sensitivity, bits_per_weight, steps
from h1export.quantize.choices import QuantName
from h1export.quantize.precision import Precision

NEXT_STEP = 'lines are "tensor: int4", int8 or none, below "tensors:"'
KIND = "a plan of precisions"
MEASURED = "a file of sensitivities"
MEASURE = "give what h1export sensitivity MODEL --json printed"
MOST_BYTES = 1 << 20  # far above the plan of the largest published model


@dataclass(frozen=True)
class StoredPlan:
    """The file: checkpoint tensor -> precision."""

    tensors: Mapping[str, QuantName]


@dataclass(frozen=True)
class StoredSensitivity:
    """What ``h1export sensitivity --json`` says of a tensor.

    Attributes:
        kl: the divergence where it alone is in few bits, in nats per token.
        shape: its rows and columns.
        int8: whether the budget raises it.
        bits: mean bits of a weight once it and all tensors of earlier steps are raised.
        left: the sum of the divergences of the tensors that are left then.
    """

    kl: float
    shape: tuple[Count, Count]
    int8: bool
    bits: float = 0.0
    left: float = 0.0


def plan_text(found: Mapping[str, Sensitivity], raised: Mapping[str, Precision]) -> str:
    """Returns a plan as YAML, a line a tensor, in the order in which a budget raises them; comments have what it buys.

    ``found`` are the sensitivities of all tensors, and
    ``raised`` the tensors that get more bits than the measured precision.
    """
    remaining = sum(tensor.kl for name, tensor in found.items() if name not in raised)
    bits = bits_per_weight(found, raised)
    lines = [
        f"# {bits:.3f} bits a weight; divergences of the tensors in few bits sum up to {remaining:.6f}",
        "tensors:",
    ]
    for step in steps(found):
        tensor = found[step.tensor]
        rows, columns = tensor.shape
        chosen = raised.get(step.tensor, tensor.low)
        measured = f"KL {tensor.kl:.6f} in int{tensor.low.bits}, {rows} x {columns}"
        bought = f"with all above in int8: {step.bits:.3f} bits, KL {step.kl:.6f}"
        lines.append(f"  {step.tensor}: int{chosen.bits}  # {measured}; {bought}")
    return "\n".join(lines) + "\n"


def read_plan(file: Path) -> dict[str, QuantName]:
    """Read a plan: checkpoint name -> precision. Comments do not count.

    Raises:
        H1ExportError: the file is not a plan. QuantScheme.check finds tensors that the model does not have.
    """
    text = read_text(file, "--precisions", kind=KIND, most=MOST_BYTES)
    found = forms.parse(text, StoredPlan, where=file, what=KIND, next_step=NEXT_STEP, language=forms.from_yaml)
    return dict(found.tensors)


def read_measured(file: Path) -> dict[str, float]:
    """Read what ``h1export sensitivity --json`` printed: checkpoint name -> KL divergence in nats.

    Raises:
        H1ExportError: the file is something else, or has a figure that is no divergence.
    """
    text = read_text(file, "--sensitivity", kind=MEASURED, most=MOST_BYTES)
    found = forms.parse(text, dict[str, StoredSensitivity], where=file, what=MEASURED, next_step=MEASURE)
    for name, tensor in found.items():
        if not (math.isfinite(tensor.kl) and tensor.kl >= 0):
            raise H1ExportError(file, f'tensor "{name}" has a divergence of {tensor.kl}', MEASURE)
    return {name: tensor.kl for name, tensor in found.items()}
