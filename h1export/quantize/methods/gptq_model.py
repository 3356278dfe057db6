"""GPTQ of a whole model: layer by layer, each on what the layers before it, quantised already, make of the calibration text.

What a layer should be given, by the checkpoint's weights, goes along: a product makes up for what quantisation did to its inputs.
Last comes the head, each of whose rows is solved on the contexts in which its token is likely.
Memory holds a layer. Both sequences between two layers, and the integers, lie in files of the stage's scratch folder, so that a build
that was killed goes on in the layer where it stopped. Bytes do not depend on the number of threads: each computes on its own, and
sums are taken in the order of the sequences.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import numpy as np
import torch
from torch import Tensor

from h1export.artifact.journal import SCRATCH, Extent
from h1export.artifact.staging import Stage
from h1export.artifact.weight_file import Rows, WeightFile, in_order
from h1export.checkpoint.store import WeightStore
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array
from h1export.progress import Progress
from h1export.quantize.layers import LoadedLayer, embed, final_norm, head_tensor, one_thread_each, products
from h1export.quantize.methods.gptq import Inverse, invert, solve_rows
from h1export.quantize.methods.head_groups import contexts
from h1export.quantize.methods.stored import Place, StoredIntegers
from h1export.quantize.source import QuantizedWeights
from h1export.runtime.runner import Ids

WORK = f"{SCRATCH}/gptq"
PLAIN = 0.5  # how much the plain moments count beside those of the contexts that matter to a token
SOLVE_BYTES = 16 << 20  # of float32 rows that a thread solves at a time
ALIGN = 64

Groups = Mapping[str, tuple[str, ...]]  # input of a product -> the weights that it is multiplied by
Run = Callable[
    [Array], tuple[Array, Mapping[str, Tensor]]
]  # sequence [length, hidden] -> output, and inputs of products [length, columns]


@dataclass(frozen=True)
class Moments:
    """Sums over all positions of a product's inputs x, and of what they should be, t: float64 [columns, columns].

    Attributes:
        own: x x^T.
        drift: (t - x) x^T.
    """

    own: Tensor
    drift: Tensor

    @classmethod
    def zero(cls, columns: int) -> Moments:
        return cls(*(torch.zeros(columns, columns, dtype=torch.float64) for _ in range(2)))

    def add(self, truth: Tensor, found: Tensor, weights: Tensor | None = None) -> None:
        """The positions of a sequence [length, columns], each so many times as ``weights`` [length] say."""
        weighed = found if weights is None else found * weights[:, None]
        self.own.add_(found.T @ weighed)
        self.drift.add_((truth - found).T @ weighed)

    def mixed(self, other: Moments, share: float) -> Moments:
        """With ``share`` of another's, after both are brought to one size."""
        sizes = [float(moments.own.diagonal().mean()) or 1.0 for moments in (self, other)]
        own, drift = (
            mine / sizes[0] + share / sizes[1] * theirs
            for mine, theirs in ((self.own, other.own), (self.drift, other.drift))
        )
        return Moments(own, drift)


def solve(
    store: WeightStore, config: FalconH1Config, rest: QuantizedWeights, *, ids: Ids, stage: Stage, progress: Progress
) -> StoredIntegers:
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
        solver = _Solver(store, config, rest, ids=ids, stage=stage, file=file)
        solver.run(progress)
    return solver.solved


class _Solver:
    """The work of one build. ``file`` holds the integers of all tensors, and what goes into one layer and the next, wrong and right."""

    def __init__(
        self,
        store: WeightStore,
        config: FalconH1Config,
        rest: QuantizedWeights,
        *,
        ids: Ids,
        stage: Stage,
        file: WeightFile,
    ) -> None:
        self._store = store
        self._spec = config
        self._ids = ids
        self._stage = stage
        self._file = file
        self._head = head_tensor(config)
        tensors = [
            tensor
            for layer in range(config.num_hidden_layers)
            for group in products(layer).values()
            for tensor in group
        ]
        places = {tensor: self._place(tensor, rest) for tensor in (*tensors, self._head) if tensor in rest.precisions}
        self.solved = StoredIntegers(stage.folder, places, rest)
        self._shape = (*ids.shape, config.hidden_size)
        self._between = [file.reserve("between", 4 * prod(self._shape), ALIGN) for _ in range(4)]

    def _place(self, tensor: str, rest: QuantizedWeights) -> Place:
        rows, columns = self._store.shape(tensor)
        scales = rows * columns // rest.precisions[tensor].columns_per_group(columns)
        codes = self._file.reserve(f"{tensor}.codes", rows * columns, ALIGN)
        return Place((rows, columns), codes, self._file.reserve(f"{tensor}.scales", 2 * scales, ALIGN))

    def run(self, progress: Progress) -> None:
        """Solve what is not solved yet, from the last layer before it whose input lies in the file."""
        layers = self._spec.num_hidden_layers
        unsolved = next((layer for layer in range(layers) if self._open(products(layer))), layers)
        if unsolved == layers and not self._is_open(self._head):
            return
        start = next((layer for layer in range(unsolved, 0, -1) if all(map(self._file.holds, self._inputs(layer)))), 0)
        if start == 0:
            self._file.write(
                self._inputs(0), (partial(_twice, embed, self._store, self._spec, ids) for ids in self._ids)
            )
        for layer in range(start, layers):
            progress.stage(f"GPTQ, layer {layer + 1} of {layers}")
            self._solve_layer(layer, self._open(products(layer)))
        if self._is_open(self._head):
            progress.stage("GPTQ, head")
            self._solve_head()

    def _solve_layer(self, layer: int, groups: Groups) -> None:
        """Solve ``groups``, and write what should come into the next layer and what does."""
        (truth, ours) = self._inputs(layer + 1)
        moments = dict[str, Moments]()
        outputs = self._watched(
            LoadedLayer(self._store, self._spec, layer, read=self._original).run, layer, groups, moments=moments
        )
        if groups and self._file.holds(truth):  # written by a build that was killed afterwards
            deque(outputs, maxlen=0)
        else:
            self._file.write([truth], (partial(_this, output) for output in outputs))
        self._solve(groups, moments)
        quantised = LoadedLayer(self._store, self._spec, layer, read=self._quantised).output
        self._file.write([ours], (partial(_alone, quantised, found) for _, found in self._sequences(layer)))

    def _solve_head(self) -> None:
        """Solve the head group by group, each on the moments of the contexts that matter to its tokens, and a share of the plain ones."""
        weight = torch.from_numpy(self._original(self._head))
        found = contexts(self._head_inputs, weight, self._spec.lm_head_multiplier, jobs=self._stage.jobs)
        place = self.solved.places[self._head]
        plain = Moments.zero(weight.shape[1])
        for right, ours in in_order(self._head_inputs(), self._stage.jobs):
            plain.add(right, ours)
        codes = np.empty(place.shape, np.int8)
        scales = np.empty((place.shape[0], place.scales.length // 2 // place.shape[0]), np.float16)
        groups = [torch.nonzero(found.groups == group)[:, 0].numpy() for group in range(len(found.weights))]
        calls = (
            partial(self._solve_group, weight, rows, weights, plain=plain)
            for rows, weights in zip(groups, found.weights, strict=True)
        )
        for rows, solved in zip(groups, in_order(calls, self._stage.jobs), strict=True):
            codes[rows], scales[rows] = solved
        self._file.write([place.codes, place.scales], [partial(_these, codes, scales)])

    def _head_inputs(self) -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
        """What should come into the head and what does, [length, columns], a sequence a call."""
        norm = partial(final_norm, self._store, self._spec)
        return (partial(_normed, norm, *pair) for pair in self._sequences(self._spec.num_hidden_layers))

    def _solve_group(self, weight: Tensor, rows: Ids, weights: Tensor, *, plain: Moments) -> tuple[Rows, Rows]:
        """Codes and scales of some ``rows`` of the head; ``weights`` [samples, length] of their positions."""
        moments = Moments.zero(weight.shape[1])
        for sequence, call in zip(weights, self._head_inputs(), strict=True):
            moments.add(*call(), sequence)
        inverse = _inverse(moments.mixed(plain, PLAIN), self._head)
        step = max(1, SOLVE_BYTES // (4 * weight.shape[1]))
        parts = [weight[rows[start : start + step]].numpy() for start in range(0, len(rows), step)]
        solved = [solve_rows(part, self.solved.precisions[self._head], inverse, name=self._head) for part in parts]
        return np.concatenate([part.codes for part in solved]), np.concatenate([part.scales for part in solved])

    def _open(self, groups: Mapping[str, tuple[str, ...]]) -> Groups:
        """Of ``groups``, what is to be solved and is not in the file."""
        left = {name: tuple(tensor for tensor in group if self._is_open(tensor)) for name, group in groups.items()}
        return {name: group for name, group in left.items() if group}

    def _is_open(self, tensor: str) -> bool:
        place = self.solved.places.get(tensor)
        return place is not None and not (self._file.holds(place.codes) and self._file.holds(place.scales))

    def _inputs(self, layer: int) -> tuple[Extent, Extent]:
        """Where what should come into ``layer`` lies, and what does: float32 [samples, length, hidden]. Those of the head are the last."""
        truth, ours = self._between[layer % 2 :: 2]
        return replace(truth, tensor=f"right input of layer {layer}"), replace(ours, tensor=f"input of layer {layer}")

    def _sequences(self, layer: int) -> Iterator[tuple[Array, Array]]:
        """Of ``_inputs``, sequence by sequence."""
        maps = (
            np.memmap(self._stage.folder / extent.file, np.float32, "r", extent.offset, self._shape)
            for extent in self._inputs(layer)
        )
        return zip(*maps, strict=True)

    def _watched(self, run: Run, layer: int, groups: Groups, *, moments: dict[str, Moments]) -> Iterator[Array]:
        """The outputs of ``run`` for what should come into ``layer``, while ``moments`` gather those of ``groups``."""
        runs = (partial(_both, run, truth, found if groups else None) for truth, found in self._sequences(layer))
        for (output, right), found in in_order(runs, self._stage.jobs):
            for name in groups:
                if name not in moments:
                    moments[name] = Moments.zero(found[name].shape[1])
                moments[name].add(right[name], found[name])
            yield output

    def _solve(self, groups: Groups, moments: dict[str, Moments]) -> None:
        inverses = in_order(
            (partial(_inverse, moments.pop(name), group[0]) for name, group in groups.items()), self._stage.jobs
        )
        for inverse, group in zip(inverses, groups.values(), strict=True):
            for tensor in group:
                place = self.solved.places[tensor]
                ranges = self._store.row_ranges([tensor], SOLVE_BYTES)
                self._file.write(
                    [place.codes, place.scales], (partial(self._rows, tensor, inverse, *rows) for rows in ranges)
                )

    def _rows(self, tensor: str, inverse: Inverse, start: int, stop: int) -> tuple[Rows, Rows]:
        found = solve_rows(self._store.rows(tensor, start, stop), self.solved.precisions[tensor], inverse, name=tensor)
        return found.codes, found.scales

    def _original(self, tensor: str) -> Array:
        return self._store.rows(tensor, 0, self._store.shape(tensor)[0])

    def _quantised(self, tensor: str) -> Array:
        rows = self._store.shape(tensor)[0]
        return self.solved.rows(tensor, 0, rows).unfolded() if tensor in self.solved.places else self._original(tensor)


def _both(
    run: Run, truth: Array, found: Array | None
) -> tuple[tuple[Array, Mapping[str, Tensor]], Mapping[str, Tensor]]:
    """``run`` of copies, because torch takes no array that it could not write to; of ``found`` the inputs only, where it is given."""
    return run(np.array(truth)), {} if found is None else run(np.array(found))[1]


def _inverse(moments: Moments, name: str) -> Inverse:
    return invert(moments.own, name, moments.drift)


def _alone(function: Callable[[Array], Array], sequence: Array) -> tuple[Array]:
    return (function(np.array(sequence)),)


def _these(codes: Rows, scales: Rows) -> tuple[Rows, Rows]:
    return codes, scales


def _normed(norm: Callable[[Array], Tensor], truth: Array, found: Array) -> tuple[Tensor, Tensor]:
    return norm(np.array(truth)), norm(np.array(found))


def _this(sequence: Array) -> tuple[Array]:
    return (sequence,)


def _twice(function: Callable[..., Array], *arguments: object) -> tuple[Array, Array]:
    found = function(*arguments)
    return found, found
