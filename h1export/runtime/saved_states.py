"""SavedStates: the states of one sequence as plain arrays, from which another session or process can go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array, StateSpec


@dataclass(frozen=True)
class SavedStates:
    """The states of a sequence of ``length`` tokens, with the keys and values of the tokens from ``start`` on.

    Attributes:
        start: The first token whose keys and values are here. Those before it are in a part saved earlier.
        length: The number of tokens that the states have seen.
        arrays: float32 by ``StateTensor.key``, in StateSpec's layouts with a batch of 1; keys and values are
            [1, heads, length - start, head_dim].
    """

    start: int
    length: int
    arrays: Mapping[str, Array]

    @classmethod
    def of(cls, spec: StateSpec, snapshot: Mapping[str, Array], row: int, *, start: int, length: int) -> SavedStates:
        """Copy one row of ``snapshot``, the states of several sequences of ``length`` tokens by ``StateTensor.key``.

        Raises:
            H1ExportError: There is no such row, or no token from ``start`` on.
        """
        rows = len(next(iter(snapshot.values())))
        check_part(row, rows, start, length=length)
        arrays = {}
        for tensor in spec.tensors:
            array = snapshot[tensor.key][row : row + 1]
            part = array[:, :, start:length] if tensor.kind.grows else array
            arrays[tensor.key] = np.array(part, np.float32, order="C")  # a copy, whatever the session does next
        return cls(start, length, arrays)

    @classmethod
    def joined(cls, spec: StateSpec, parts: Sequence[SavedStates]) -> SavedStates:
        """Return consecutive parts as one: the keys and values of all, and the other states of the last.

        Raises:
            H1ExportError: A part does not begin where the one before it ends.
        """
        for before, after in pairwise(parts):
            if after.start != before.length:
                what = f"end at token {before.length}, and the next ones begin at {after.start}"
                raise H1ExportError("saved states", what, "join consecutive parts")
        arrays = {
            tensor.key: np.concatenate([part.arrays[tensor.key] for part in parts], axis=2)
            if tensor.kind.grows
            else parts[-1].arrays[tensor.key]
            for tensor in spec.tensors
        }
        return cls(parts[0].start, parts[-1].length, arrays)

    def check(self, spec: StateSpec, capacity: int | None = None) -> None:
        """Check that these are whole states of a model with ``spec``, and fit a session of ``capacity`` tokens.

        Raises:
            H1ExportError: They begin later, are longer, or have other names, shapes or dtypes.
        """
        if self.start or self.length < 1:
            what = f"are of tokens {self.start} to {self.length}"
            raise H1ExportError("saved states", what, "join them with the parts before them")
        if capacity is not None and self.length > capacity:
            what = f"of {self.length} tokens, and there is room for {capacity}"
            raise H1ExportError("saved states", what, "start with a larger capacity")
        expected = {tensor.key: (tensor.sized(1, self.length), np.dtype(np.float32)) for tensor in spec.tensors}
        if {key: (array.shape, array.dtype) for key, array in self.arrays.items()} != expected:
            raise H1ExportError("saved states", "are not those of this model", "save them with the same artifact")

    def columns(self, key: str, length: int) -> Array:
        """Return keys or values with ``length`` columns, zeros beyond the saved ones."""
        array = self.arrays[key]
        wide = np.zeros((*array.shape[:2], length, array.shape[3]), np.float32)
        wide[:, :, : self.length] = array
        return wide


def check_part(row: int, rows: int, start: int, *, length: int) -> None:
    """Check that a session of ``rows`` rows and ``length`` tokens has that row, and tokens from ``start`` on.

    Raises:
        H1ExportError: It has not.
    """
    if not (0 <= row < rows and 0 <= start < length):
        what = f"row {row} of {rows} from token {start} of {length}"
        raise H1ExportError("save", what, "give a row of the session, and save after a token")
