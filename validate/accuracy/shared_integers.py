"""Count the tensors whose integers are the same in several artifacts of one checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from h1export.model.falcon_h1.states import Array
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.report.checks import CheckKind, Comparison
from h1export.report.report import TENSORS, Row


@runtime_checkable
class StoredIntegers(Protocol):
    """The stored weights of a runtime that shows their integers."""

    def quantized(self, name: str) -> QuantizedTensor:
        """Return the integers of checkpoint tensor ``name``."""
        ...


def integer_rows(stored: Sequence[Mapping[str, Array]]) -> list[Row]:
    """Return the row of each artifact, in order: how many tensors are quantised, and how many as in each other one.

    A tensor is the same where every code is, counted from its zero point; scales may be rounded by a format. One tensor
    of each artifact is in memory at a time.

    Args:
        stored: ``Inspectable.stored_weights`` of each artifact.
    """
    digests = [_digests(each) for each in stored]
    return [_row(place, digests) for place in range(len(digests))]


def _row(place: int, digests: Sequence[Mapping[str, bytes]]) -> Row:
    own = digests[place]
    shared = {
        f"as in {other + 1}": float(sum(found.get(name) == digest for name, digest in own.items()))
        for other, found in enumerate(digests)
        if other != place
    }
    return Row(
        CheckKind.SHARED_INTEGERS,
        Comparison.ALONE,
        figures={TENSORS: float(len(own)), **shared},
        note="tensors with integers, and how many are the same in each other artifact",
    )


def _digests(stored: Mapping[str, Array]) -> dict[str, bytes]:
    """Return checkpoint tensor -> a hash of its integers; nothing for a runtime that does not show them."""
    if not isinstance(stored, StoredIntegers):
        return {}
    return {name: _digest(stored.quantized(name)) for name in stored}


def _digest(tensor: QuantizedTensor) -> bytes:
    codes = tensor.codes.astype(np.int16)
    if tensor.zeros is not None:
        groups = codes.reshape(len(codes), tensor.zeros.shape[1], -1)
        codes = (groups - tensor.zeros[..., None]).reshape(codes.shape)
    return hashlib.sha256(codes.tobytes()).digest()
