"""BoundRows: sequences of different lengths whose next tokens are one call of the graph over our own kernels.

All rows end at the same column of the keys' buffers, and each begins where its length puts it. To the graph that is a
batch padded on the left. Our kernels compute a row alike whatever its pads and the other rows are.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array, StateTensor
from h1export.runtime.runner import RestorableSession
from h1export.runtime.session import WHAT
from h1export.runtime.sharing import OneCall, one_call
from h1export.targets.onnxruntime.bound_session import BoundGraph, bind_state, run_bound

LEAST_COLUMNS = 1024
MOST_USED = 0.8  # of the columns, by the longest row, for which moving rows to the left is worth it
LEAST_USED = 4  # times the longest row: buffers of more columns are given back


@dataclass(eq=False)
class _Row:
    """A sequence of ``length`` tokens in ``slot``; its keys end before column ``end``."""

    slot: int
    end: int
    length: int


class BoundRows:
    """Rows over an InferenceSession, whose states are in buffers [slots, ...] that it reads and writes in place.

    Buffers are virtual memory until rows write to them. Where no column is free, rows move to the left, or to buffers
    that are longer, or shorter where long rows have left, so that a token costs a few copied columns at most.

    Args:
        graph: The InferenceSession and its graph, on the CPU.
        most: The largest number of rows.
        context: The largest number of tokens of a row.
    """

    def __init__(self, graph: BoundGraph, most: int, context: int) -> None:
        self._graph = graph
        self._most = most
        self._context = context
        self._one_call = OneCall(WHAT)
        self._rows: list[_Row] = []
        self._columns = 0
        self._end = 0  # where the rows of the last call end
        self._buffers: dict[str, Array] = {}
        self._bindings: dict[int, Any] = {}  # by the number of rows

    @one_call
    def join(self, session: RestorableSession) -> Hashable:
        """Copy the states of ``session``, which has one row.

        Raises:
            H1ExportError: There are as many rows as there may be.
        """
        if len(self._rows) == self._most:
            raise H1ExportError("rows", f"are {self._most} already", "let one leave first")
        saved = session.save()
        if saved.length > self._columns:
            self._resize(saved.length)
        free = set(range(self._most)) - {row.slot for row in self._rows}
        # where it ends with the others it need not move before the next call
        row = _Row(min(free), max(self._end, saved.length), saved.length)
        for tensor in self._graph.states.tensors:
            self._part(tensor, row)[:] = self._graph.state_layout.stored(tensor.kind, saved.arrays[tensor.key])[0]
        self._rows.append(row)
        return row

    @one_call
    def append(self, tokens: Mapping[Hashable, int]) -> dict[Hashable, Array | BaseException]:
        rows = [row for row in self._rows if row in tokens]
        if len(rows) != len(tokens):
            raise H1ExportError("rows", "has left, or never joined", "let it join first")
        answers: dict[Hashable, Array | BaseException] = {}
        for row in rows:
            if (error := self._refusal(row, tokens[row])) is not None:
                answers[row] = error
        rows = [row for row in rows if row not in answers]
        if not rows:
            return answers
        self._align(rows)
        rows.sort(key=lambda row: row.slot)
        ids = np.array([[tokens[row]] for row in rows], np.int64)
        mask = np.zeros((len(rows), self._end + 1), np.int64)
        for row in rows:
            mask[row.slot, row.end - row.length :] = 1
        logits = run_bound(self._graph, self._binding(len(rows)), ids, mask=mask)
        self._end += 1
        for row in rows:
            row.end += 1
            row.length += 1
        return {**answers, **dict(zip(rows, logits[:, -1], strict=True))}

    @one_call
    def leave(self, row: Hashable) -> None:
        self._rows = [one for one in self._rows if one is not row]
        if not self._rows:
            self._end = 0
            if self._columns > LEAST_COLUMNS:
                self._columns = 0
                self._buffers.clear()
                self._bindings.clear()

    def _refusal(self, row: _Row, token: int) -> H1ExportError | None:
        if row.length == self._context:
            return H1ExportError("append", f"the context of {self._context} tokens is full", "begin a new sequence")
        if not 0 <= token < self._graph.vocab_size:
            return H1ExportError("append", f"token id {token}", f"the vocabulary is 0 to {self._graph.vocab_size - 1}")
        return None

    def _binding(self, rows: int) -> Any:
        if rows not in self._bindings:
            binding = self._graph.session.io_binding()
            for tensor in self._graph.states.tensors:
                buffer = self._buffers[tensor.past]
                bind_state(binding, tensor, [rows, *buffer.shape[1:]], address=buffer.ctypes.data, dtype=buffer.dtype)
            self._bindings[rows] = binding
        return self._bindings[rows]

    def _part(self, tensor: StateTensor, row: _Row) -> Array:
        return _part_of(self._buffers[tensor.past], tensor, row)

    def _resize(self, longest: int) -> None:
        """Let the buffers have room for rows of ``longest`` tokens and half as many more, and all rows end together."""
        before, self._buffers = self._buffers, {}
        self._columns = max(longest + longest // 2, LEAST_COLUMNS)
        self._end = max((row.length for row in self._rows), default=0)
        self._bindings.clear()
        for tensor in self._graph.states.tensors:
            layout = self._graph.state_layout
            shape = layout.sized(tensor, self._most, self._columns)
            self._buffers[tensor.past] = np.zeros(shape, layout.dtype(tensor.kind))
            for row in self._rows:
                place = _Row(row.slot, self._end, row.length)
                self._part(tensor, place)[:] = _part_of(before[tensor.past], tensor, row)
            before.pop(tensor.past, None)  # so that only one tensor is there twice
        for row in self._rows:
            row.end = self._end

    def _align(self, rows: Sequence[_Row]) -> None:
        """Bring ``rows`` into the first slots, and their ends to one column with a free column behind it."""
        if not max(row.length for row in rows) <= self._end < self._columns:
            longest = max(row.length for row in self._rows) + 1
            if longest > self._columns * MOST_USED or self._columns > max(longest * LEAST_USED, LEAST_COLUMNS):
                self._resize(longest)
            else:
                self._end = longest - 1
        taken = {row.slot for row in rows}
        free = iter([slot for slot in range(len(rows)) if slot not in taken])
        waiting = {row.slot: row for row in self._rows if row not in rows}
        places = {}
        for row in rows:
            slot = row.slot if row.slot < len(rows) else next(free)
            places[row] = slot, self._end
            if slot in waiting:  # they change places
                places[waiting[slot]] = row.slot, waiting[slot].end
        self._move({row: place for row, place in places.items() if place != (row.slot, row.end)})

    def _move(self, places: Mapping[_Row, tuple[int, int]]) -> None:
        """Move rows to other slots and ends, where they may lie on each other's places before."""
        if not places:
            return
        moved = {row: _Row(slot, end, row.length) for row, (slot, end) in places.items()}
        for tensor in self._graph.states.tensors:
            copies = {
                row: self._part(tensor, row).copy() for row in moved if tensor.kind.grows or row.slot != moved[row].slot
            }
            for row, copy in copies.items():
                self._part(tensor, moved[row])[:] = copy
        for row, place in moved.items():
            row.slot, row.end = place.slot, place.end


def _part_of(buffer: Array, tensor: StateTensor, row: _Row) -> Array:
    """Return the row's part of a state's buffer [slots, ...]."""
    part: Array = buffer[row.slot]
    return part[:, row.end - row.length : row.end] if tensor.kind.grows else part
