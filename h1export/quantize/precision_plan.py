"""A plan of precisions, tensor by tensor, as a file: written from measured sensitivities, edited by hand, given back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml

from h1export.errors import H1ExportError
from h1export.quantize.budget import Sensitivity, bits_per_weight
from h1export.quantize.precision import Precision
from h1export.quantize.scheme import QuantName

NEXT = 'lines are "tensor: int4", int8 or none, below "tensors:"'


def plan_text(found: Mapping[str, Sensitivity], raised: Mapping[str, Precision]) -> str:
    """YAML with a line a tensor, the most sensitive first; what was measured stands in comments."""
    left = sum(tensor.kl for name, tensor in found.items() if name not in raised)
    lines = [
        f"# {bits_per_weight(found, raised):.3f} bits a weight; divergences of the tensors in few bits sum up to {left:.6f}",
        "tensors:",
    ]
    for name, tensor in sorted(found.items(), key=lambda item: -item[1].kl):
        rows, columns = tensor.shape
        lines.append(
            f"  {name}: int{raised.get(name, tensor.low).bits}  # KL {tensor.kl:.6f} in int{tensor.low.bits}, {rows} x {columns}"
        )
    return "\n".join(lines) + "\n"


def read_plan(file: Path) -> dict[str, QuantName]:
    """The inverse of plan_text, but for the comments.

    Raises:
        H1ExportError: not such a file. Whether a model has its tensors is for QuantScheme to say.
    """
    try:
        data: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        tensors = data["tensors"]
        plan = {str(name): _precision(value) for name, value in tensors.items()}
    except OSError as error:
        raise H1ExportError(file, f"cannot be read ({error.strerror})", "give another --precisions") from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise H1ExportError(file, f"is not a plan of precisions ({' '.join(str(error).split())})", NEXT) from None
    return plan


def _precision(value: object) -> QuantName:
    found: QuantName | None = next((name for name in get_args(QuantName) if name == value), None)
    if found is None:
        raise ValueError(f"{value!r} is no precision")
    return found
