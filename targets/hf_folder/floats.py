"""Tensors of a checkpoint as floats of a chosen dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from h1export.artifact.weight_file import BLOCK_BYTES, Block
from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.weight_expr import Multiplier, WeightPart
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array

Floats = npt.NDArray[Any]
SMALLEST = {"F16": 2.0**-24, "BF16": 2.0**-133, "F32": 2.0**-149}  # the least positive value of a dtype


def rounded(values: npt.NDArray[Any], dtype: str, *, tensor: str) -> Floats:
    """Return ``values`` in dtype "F32", "F16" or "BF16"; the bits of bf16 are uint16, as numpy has no such dtype.

    Raises:
        H1ExportError: a value is not finite in this dtype; the error names ``tensor``.
    """
    kinds: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    with np.errstate(over="ignore"):
        found = values.astype(kinds[dtype])
    if not np.isfinite(found.astype(np.float32)).all():
        what = f"holds values that {dtype} cannot hold"
        raise H1ExportError(f'tensor "{tensor}"', what, "store it in a wider dtype, or download the checkpoint again")
    return found.view(np.uint16) if dtype == "BF16" else found


def unrounded(stored: Floats, dtype: str) -> Array:
    """Return what ``rounded`` gave as float32."""
    return stored.view(ml_dtypes.bfloat16).astype(np.float32) if dtype == "BF16" else stored.astype(np.float32)


def float_blocks(
    store: WeightStore,
    tensor: str,
    dtype: str,
    *,
    multiplier: Multiplier = Multiplier(),  # noqa: B008  frozen
    arranged: Callable[[Array], Array] = lambda block: block,
) -> Iterator[Block]:
    """Yield functions that compute the next rows of a tensor in ``dtype``.

    ``arranged`` changes the layout of a block of rows after the multiplication by ``multiplier``.
    """
    part = WeightPart(tensor, multiplier=multiplier)
    for start, stop in store.row_ranges([tensor], BLOCK_BYTES):
        yield partial(_block, part, store, dtype, start=start, stop=stop, arranged=arranged)


def _block(
    part: WeightPart,
    store: WeightStore,
    dtype: str,
    *,
    start: int,
    stop: int,
    arranged: Callable[[Array], Array],
) -> tuple[Floats]:
    return (rounded(arranged(part.rows(store, start, stop)), dtype, tensor=part.tensor),)


def exact_dtype(store: WeightStore, tensor: str) -> str:
    """Return the narrowest dtype that holds every value of ``tensor``: the file's own, or F32 where they were changed.

    Adapters and activation-aware scales change values, and a packed weight stands for products of codes and scales.
    """
    changed = type(store) is not WeightStore or store.adapters or tensor in store.packed
    return "F32" if changed else store.entry(tensor).dtype
