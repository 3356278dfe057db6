"""The plan file: a precision for every tensor, written from measured sensitivities, edited by hand, read by builds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from h1export import forms
from h1export.checkpoint.text_file import read_text
from h1export.quantize.budget import Sensitivity, bits_per_weight
from h1export.quantize.choices import QuantName
from h1export.quantize.precision import Precision

NEXT_STEP = 'lines are "tensor: int4", int8 or none, below "tensors:"'
KIND = "a plan of precisions"
MOST_BYTES = 1 << 20  # far above the plan of the largest published model


@dataclass(frozen=True)
class StoredPlan:
    """The file: checkpoint tensor -> precision."""

    tensors: Mapping[str, QuantName]


def plan_text(found: Mapping[str, Sensitivity], raised: Mapping[str, Precision]) -> str:
    """Returns a plan as YAML, one line a tensor, the most sensitive first; comments have what was measured.

    ``found`` are the sensitivities of all tensors, and ``raised`` the tensors that get more bits than the measured
    precision.
    """
    remaining = sum(tensor.kl for name, tensor in found.items() if name not in raised)
    bits = bits_per_weight(found, raised)
    lines = [
        f"# {bits:.3f} bits a weight; divergences of the tensors in few bits sum up to {remaining:.6f}",
        "tensors:",
    ]
    for name, tensor in sorted(found.items(), key=lambda item: -item[1].kl):
        rows, columns = tensor.shape
        chosen = raised.get(name, tensor.low)
        measured = f"KL {tensor.kl:.6f} in int{tensor.low.bits}, {rows} x {columns}"
        lines.append(f"  {name}: int{chosen.bits}  # {measured}")
    return "\n".join(lines) + "\n"


def read_plan(file: Path) -> dict[str, QuantName]:
    """Read a plan: checkpoint name -> precision. Comments do not count.

    Raises:
        H1ExportError: the file is not a plan. QuantScheme.check finds tensors that the model does not have.
    """
    text = read_text(file, "--precisions", kind=KIND, most=MOST_BYTES)
    found = forms.parse(text, StoredPlan, where=file, what=KIND, next_step=NEXT_STEP, language=forms.from_yaml)
    return dict(found.tensors)
