"""The plan file: a precision for every tensor, written from measured sensitivities, edited by hand, read by builds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml

from h1export.checkpoint.text_file import read_text
from h1export.errors import H1ExportError, reason
from h1export.model.config_reader import shown
from h1export.quantize.budget import Sensitivity, bits_per_weight
from h1export.quantize.choices import QuantName
from h1export.quantize.precision import Precision

NEXT_STEP = 'lines are "tensor: int4", int8 or none, below "tensors:"'


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
    try:
        data: Any = yaml.safe_load(read_text(file, "--precisions", kind="a plan of precisions"))
        tensors = data["tensors"]
        plan = {str(name): _quant_name(value) for name, value in tensors.items()}
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise H1ExportError(file, f"is not a plan of precisions ({reason(error)})", NEXT_STEP) from None
    return plan


def _quant_name(value: object) -> QuantName:
    found: QuantName | None = next((name for name in get_args(QuantName) if name == value), None)
    if found is None:
        raise ValueError(f"{shown(value)} is no precision")
    return found
