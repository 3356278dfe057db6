"""SolvedFile: the integers of a solver's tensors in its scratch file, judged by the guard as they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod

import numpy as np
import torch
from torch import Tensor

from h1export.artifact.journal import Extent
from h1export.artifact.stage import Stage
from h1export.artifact.weight_file import Rows, WeightFile, in_order
from h1export.checkpoint.store import WeightStore
from h1export.model.falcon_h1.states import Array, Ids
from h1export.quantize.grid import OwnTensor
from h1export.quantize.methods.gptq import Inverse, solve_rows
from h1export.quantize.methods.gptq_grid import solve_own_rows
from h1export.quantize.methods.grid_search import round_own_rows
from h1export.quantize.methods.guard import ERRORS, Errors, divergence, is_worse, output_errors
from h1export.quantize.methods.moments import InputPair
from h1export.quantize.methods.stored import ALIGN, StoredBlocks, StoredIntegers, StoredMatrix
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.quantize.source import QuantizedWeights

SOLVE_BYTES = 16 << 20  # bytes of the float32 rows that a thread solves at a time


class SolvedFile:
    """The integers of some tensors, in shared precisions or in a target's own format.

    Arrays of rows are codes and scales, or packed rows where the target has a format of its own. ``integers`` reads
    what is written so far.
    """

    def __init__(
        self,
        store: WeightStore,
        rest: QuantizedWeights,
        own: Mapping[str, OwnTensor],
        *,
        tensors: Sequence[str],
        held: int,
        stage: Stage,
        file: WeightFile,
    ) -> None:
        """Reserve space in ``file`` for ``tensors``, and for their errors on the ``held`` sequences of the guard."""
        self._store = store
        self._stage = stage
        self._file = file
        shared = {name: self._reserved(name, rest) for name in tensors if name not in own}
        blocks = {name: self._reserved_own(name, own[name]) for name in tensors if name in own}
        errors = {name: file.reserve(f"{name}.errors", 8 * ERRORS, ALIGN) for name in tensors}
        self.integers = StoredIntegers(stage.folder, shared, rest, blocks, errors, held)

    def _reserved(self, tensor: str, rest: QuantizedWeights) -> StoredMatrix:
        rows, columns = self._store.shape(tensor)
        groups = columns // rest.precisions[tensor].columns_per_group(columns)
        return StoredMatrix.reserved(self._file, tensor, (rows, columns), groups=groups)

    def _reserved_own(self, tensor: str, own: OwnTensor) -> StoredBlocks:
        rows, columns = self._store.shape(tensor)
        shape = (rows, own.format.row_bytes(columns))
        return StoredBlocks(own, shape, self._file.reserve(f"{tensor}.{own.format.name}", prod(shape), ALIGN))

    def _extents(self, tensor: str) -> list[Extent]:
        judged = self.integers.errors.get(tensor)
        if judged is None:
            return []
        if (blocks := self.integers.blocks.get(tensor)) is not None:
            return [blocks.packed, judged]
        stored = self.integers.matrices[tensor]
        return [stored.codes, stored.scales, judged]

    def lacks(self, tensor: str) -> bool:
        """Returns whether ``tensor`` is to be written and is not."""
        return not all(map(self._file.holds, self._extents(tensor)))

    def ranges(self, tensor: str) -> list[tuple[int, int]]:
        """Returns [start, stop) of the rows that a thread solves at a time."""
        return list(self._store.row_ranges([tensor], SOLVE_BYTES))

    def solved(self, tensor: str, weight: Array, rows: Ids, *, inverse: Inverse) -> tuple[Rows, ...]:
        """Returns arrays for the ``rows`` of ``tensor`` by GPTQ; ``weight`` has their weights."""
        blocks = self.integers.blocks.get(tensor)
        if blocks is not None:
            return (solve_own_rows(weight * blocks.own.factors[rows, None], blocks.own.format, inverse, name=tensor),)
        found = solve_rows(weight, self.integers.precisions[tensor], inverse, name=tensor)
        return found.codes, found.scales

    def plain(self, tensor: str, rows: tuple[int, int]) -> tuple[Rows, ...]:
        """Returns arrays for ``rows``, [start, stop), by plain rounding."""
        blocks = self.integers.blocks.get(tensor)
        if blocks is None:
            found = self.integers.rest.rows(tensor, *rows)
            return found.codes, found.scales
        weight = self._store.rows(tensor, *rows) * blocks.own.factors[slice(*rows), None]
        return (round_own_rows(weight, blocks.own.format, name=tensor),)

    def values(self, tensor: str, arrays: Sequence[Rows], rows: tuple[int, int]) -> Array:
        """Returns the weights that the arrays of ``rows`` stand for, float32 [rows, columns], without µP."""
        blocks = self.integers.blocks.get(tensor)
        if blocks is not None:
            return blocks.own.of_rows(slice(*rows)).unfolded(arrays[0])
        codes, scales = arrays
        return QuantizedTensor(codes, scales, np.ones(len(codes), np.float32)).unfolded()

    def write_projection(self, tensor: str, inverse: Inverse, held: Sequence[InputPair]) -> None:
        """Solve and write a projection; ``held`` are its inputs on the guard's sequences."""
        calls = (partial(self._solve_and_judge, tensor, inverse, held, rows=rows) for rows in self.ranges(tensor))
        parts, errors = zip(*in_order(calls, self._stage.jobs), strict=True)
        solved = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        self._write(tensor, solved, np.asarray(sum(errors)))

    def _solve_and_judge(
        self, tensor: str, inverse: Inverse, held: Sequence[InputPair], *, rows: tuple[int, int]
    ) -> tuple[tuple[Rows, ...], Errors]:
        weight = self._store.rows(tensor, *rows)
        solved = self.solved(tensor, weight, np.arange(*rows), inverse=inverse)
        candidates = (self.values(tensor, arrays, rows) for arrays in (solved, self.plain(tensor, rows)))
        return solved, output_errors(weight, list(candidates), held) if held else np.zeros(ERRORS)

    def write_head(
        self,
        tensor: str,
        solved: Sequence[Rows],
        held: Callable[[Array], Sequence[InputPair]],
        *,
        head: Tensor,
        multiplier: float,
    ) -> None:
        """Write the head, solved already; ``head`` is its weight.

        ``held`` gives its inputs on the guard's sequences, for its integers dequantised.
        """
        errors = np.zeros(ERRORS)
        rows = (0, len(head))
        for place in range(ERRORS):  # one after the other, as both are as large as the head
            candidate = self.values(tensor, self._plain_arrays(tensor) if place else solved, rows)
            on_device = torch.from_numpy(candidate).to(head.device)
            errors[place] = divergence(held(candidate), head, on_device, multiplier=multiplier)
        self._write(tensor, solved, errors)

    def _write(self, tensor: str, solved: Sequence[Rows], errors: Errors) -> None:
        """Write the arrays of a whole tensor: ``solved`` ones, or plain ones where the guard finds these better."""
        if is_worse(errors):
            self._write_plain(tensor, errors)
        else:
            self._file.write(self._extents(tensor), [partial(tuple, [*solved, errors])])

    def _write_plain(self, tensor: str, errors: Errors) -> None:
        """Write a tensor plainly rounded, and its ``errors``."""
        self._file.write(self._extents(tensor), [partial(tuple, [*self._plain_arrays(tensor), errors])])

    def _plain_arrays(self, tensor: str) -> list[Rows]:
        """Returns arrays for all rows by plain rounding, which threads round block by block."""
        parts = in_order((partial(self.plain, tensor, rows) for rows in self.ranges(tensor)), self._stage.jobs)
        return [np.concatenate(blocks) for blocks in zip(*parts, strict=True)]
