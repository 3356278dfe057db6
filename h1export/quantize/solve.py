"""GPTQ of a whole model: layer by layer, each on what the layers before it, quantised already, make of the calibration text.

Memory holds a layer. The sequences between two layers, and the integers, lie in files of the stage's scratch folder, so that a build
that was killed goes on in the layer where it stopped. Bytes do not depend on the number of threads: each computes on its own, and
sums are taken in the order of the sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import TypeVar

import numpy as np
from torch import Tensor

from h1export.core.journal import SCRATCH, Extent
from h1export.core.progress import Progress
from h1export.core.protocols import Ids
from h1export.core.quant.gptq import Inverse, invert, solve_rows
from h1export.core.quant.integers import Integers
from h1export.core.quant.solved import Place, Solved
from h1export.core.spec import HybridSpec
from h1export.core.stage import Stage
from h1export.core.state import Array
from h1export.core.weights import WeightStore
from h1export.quantize.layers import LoadedLayer, embed, final_norm, head_tensor, one_thread_each, products
from h1export.targets.weightfile import Rows, WeightFile, in_order

WORK = f"{SCRATCH}/gptq"
SOLVE_BYTES = 16 << 20  # of float32 rows that a thread solves at a time
ALIGN = 64

T = TypeVar("T")
Groups = Mapping[str, tuple[str, ...]]  # input of a product -> the weights that it is multiplied by


def solve(store: WeightStore, spec: HybridSpec, rest: Integers, ids: Ids, stage: Stage, progress: Progress) -> Solved:
    """Integers by GPTQ for every product's weight among the precisions of ``rest``, which gives the integers of the others.

    Args:
        store: the checkpoint.
        spec: its architecture.
        rest: precisions, and the integers of what no product reads: an embedding that is not its head.
        ids: calibration tokens [samples, length].
        stage: where to work. What an earlier build with the same arguments has left there is used.
        progress: told the layers.

    Raises:
        H1ExportError: weights or inputs that are not finite, or too large for fp16 scales.
    """
    (stage.folder / SCRATCH).mkdir(exist_ok=True)
    with one_thread_each(), WeightFile(stage, WORK) as file:
        solver = _Solver(store, spec, rest, ids, stage, file)
        solver.run(progress)
    return solver.solved


class _Solver:
    """The work of one build. ``file`` holds the integers of all tensors, and twice the sequences between two layers."""

    def __init__(self, store: WeightStore, spec: HybridSpec, rest: Integers, ids: Ids, stage: Stage, file: WeightFile) -> None:
        self._store, self._spec, self._ids, self._stage, self._file = store, spec, ids, stage, file
        self._head = head_tensor(spec)
        tensors = [tensor for layer in range(spec.num_hidden_layers) for group in products(layer).values() for tensor in group]
        places = {tensor: self._place(tensor, rest) for tensor in (*tensors, self._head) if tensor in rest.precisions}
        self.solved = Solved(stage.folder, places, rest)
        self._shape = (*ids.shape, spec.hidden_size)
        self._between = [file.reserve("between", 4 * prod(self._shape), ALIGN) for _ in range(2)]

    def _place(self, tensor: str, rest: Integers) -> Place:
        rows, columns = self._store.shape(tensor)
        scales = rows * columns // rest.precisions[tensor].columns_per_scale(columns)
        codes = self._file.reserve(f"{tensor}.codes", rows * columns, ALIGN)
        return Place((rows, columns), codes, self._file.reserve(f"{tensor}.scales", 2 * scales, ALIGN))

    def run(self, progress: Progress) -> None:
        """Solve what is not solved yet, from the last layer before it whose input lies in the file."""
        layers = self._spec.num_hidden_layers
        unsolved = next((layer for layer in range(layers) if self._open(products(layer))), layers)
        if unsolved == layers and not self._open({"head": (self._head,)}):
            return
        start = next((layer for layer in range(unsolved, 0, -1) if self._file.holds(self._input(layer))), 0)
        if start == 0:
            self._write_input(0, (partial(embed, self._store, self._spec, ids) for ids in self._ids))
        for layer in range(start, layers):
            progress.stage(f"GPTQ, layer {layer + 1} of {layers}")
            if groups := self._open(products(layer)):
                self._solve(groups, self._moments(LoadedLayer(self._store, self._spec, layer, self._original).inputs, layer, groups))
            self._write_input(layer + 1, self._each(LoadedLayer(self._store, self._spec, layer, self._quantised).output, layer))
        progress.stage("GPTQ, head")
        if groups := self._open({"head": (self._head,)}):
            self._solve(groups, self._moments(lambda hidden: {"head": final_norm(self._store, self._spec, hidden)}, layers, groups))

    def _open(self, groups: Mapping[str, tuple[str, ...]]) -> Groups:
        """Of ``groups``, what is to be solved and is not in the file."""
        left = {name: tuple(tensor for tensor in group if self._is_open(tensor)) for name, group in groups.items()}
        return {name: group for name, group in left.items() if group}

    def _is_open(self, tensor: str) -> bool:
        place = self.solved.places.get(tensor)
        return place is not None and not (self._file.holds(place.codes) and self._file.holds(place.scales))

    def _input(self, layer: int) -> Extent:
        """Where the inputs of ``layer`` lie, float32 [samples, length, hidden]; those of the head are the last."""
        return replace(self._between[layer % 2], tensor=f"input of layer {layer}")

    def _each(self, function: Callable[[Array], T], layer: int) -> Iterator[Callable[[], T]]:
        """``function`` of the inputs [length, hidden] of ``layer``, sequence by sequence, when called."""
        extent = self._input(layer)
        inputs = np.memmap(self._stage.folder / extent.file, np.float32, "r", extent.offset, self._shape)
        return (partial(_of_copy, function, sequence) for sequence in inputs)

    def _write_input(self, layer: int, sequences: Iterable[Callable[[], Array]]) -> None:
        self._file.write([self._input(layer)], (partial(_alone, sequence) for sequence in sequences))

    def _moments(self, inputs: Callable[[Array], Mapping[str, Tensor]], layer: int, groups: Groups) -> dict[str, Tensor]:
        """The sums of x x^T, float64 [columns, columns], over all positions of the inputs that ``groups`` names."""
        sums: dict[str, Tensor] = {}
        for found in in_order(self._each(inputs, layer), self._stage.jobs):
            for name in groups:
                moments = found[name].T @ found[name]
                sums[name] = sums[name].add_(moments) if name in sums else moments.double()
        return sums

    def _solve(self, groups: Groups, moments: dict[str, Tensor]) -> None:
        inverses = in_order((partial(invert, moments.pop(name), group[0]) for name, group in groups.items()), self._stage.jobs)
        for inverse, group in zip(inverses, groups.values(), strict=True):
            for tensor in group:
                place = self.solved.places[tensor]
                ranges = self._store.row_ranges([tensor], SOLVE_BYTES)
                self._file.write([place.codes, place.scales], (partial(self._rows, tensor, inverse, *rows) for rows in ranges))

    def _rows(self, tensor: str, inverse: Inverse, start: int, stop: int) -> tuple[Rows, Rows]:
        found = solve_rows(self._store.rows(tensor, start, stop), self.solved.precisions[tensor], inverse, tensor)
        return found.codes, found.scales

    def _original(self, tensor: str) -> Array:
        return self._store.rows(tensor, 0, self._store.shape(tensor)[0])

    def _quantised(self, tensor: str) -> Array:
        rows = self._store.shape(tensor)[0]
        return self.solved.rows(tensor, 0, rows).unfolded() if tensor in self.solved.places else self._original(tensor)


def _of_copy(function: Callable[[Array], T], sequence: Array) -> T:
    """Of a copy, because torch takes no array that it could not write to."""
    return function(np.array(sequence))


def _alone(block: Callable[[], Array]) -> tuple[Array]:
    return (block(),)
