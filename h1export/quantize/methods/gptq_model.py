"""GPTQ of a whole model, layer by layer, so that each layer is quantised for the inputs that it will meet.

Two activations of the calibration text go through the model side by side. The *float* one is what the checkpoint's
weights compute. The *quantised* one is what the layers that are quantised already make of the same text. The steps:

1. Write the embeddings of the calibration text as both inputs of layer 0.
2. For each layer, from the first, run it once on both inputs, with the checkpoint's weights and with integers, and stop
   before each weight (staged_layer.py):
   a. Add up second moments of the weight's inputs: of the quantised input, and of its difference from the float input.
   b. Invert them, and solve the weight for integers (gptq.py). The difference of the two inputs lets it make up for
      what quantisation did to its input, in earlier layers and in this one.
   c. The guard (guard.py) compares integers with plain ones on sequences that went into no moment.
   d. Go on with the integers. The two outputs of the layer are the inputs of the next one.
3. Solve the head's rows in groups (head_groups.py). The moments for a group weigh positions by how much its tokens
   matter there, and are mixed with the moments of all positions alike.

Memory holds one layer, and the inputs of a weight for all sequences. The inputs of two layers, float and quantised, and
all integers are in one file in the stage's scratch folder, so that a build that was killed continues in the layer where
it stopped. Bytes do not depend on the number of threads: each thread computes on its own, and sums are taken in the
order of the sequences.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from h1export.artifact.journal import SCRATCH, Extent
from h1export.artifact.stage import Stage
from h1export.artifact.weight_file import Rows, WeightFile, in_order
from h1export.checkpoint.store import WeightStore
from h1export.host import return_freed_memory
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array, Ids
from h1export.progress import Progress
from h1export.quantize.device import CPU_DEVICE, ComputeDevice
from h1export.quantize.grid import OwnTensor
from h1export.quantize.layers import LoadedLayer, embed, final_norm, head_tensor, weights_by_input
from h1export.quantize.methods.gptq import DAMPING, Inverse, invert
from h1export.quantize.methods.guard import held_out
from h1export.quantize.methods.head_groups import group_head
from h1export.quantize.methods.layer_runs import Stops, advance, embedded, normed_pair, outputs, same_pair, started
from h1export.quantize.methods.moments import InputPair, Moments, weighted
from h1export.quantize.methods.solved_file import SOLVE_BYTES, SolvedFile
from h1export.quantize.methods.staged_layer import STOPS, StagedLayer
from h1export.quantize.methods.stored import ALIGN, StoredIntegers
from h1export.quantize.source import QuantizedWeights

WORK = f"{SCRATCH}/gptq"  # the file of integers and activations, relative to the stage
WEIGHING = 0.25  # the share of positions that the moments for a group of the head's rows have: those that weigh most
UNWEIGHTED_SHARE = 0.5  # weight of the moments of all positions, beside those weighted for a group of the head's rows
# Of a head that is the embedding too: its rows are also inputs, so they may not move far for the sake of the logits. On
# the proxy of benchmarks/, 0.5 to 4 give nearly the same divergence, and DAMPING gives more than plain rounding.
TIED_DAMPING = 2.0

# Name of an input -> checkpoint names of the weights that it is multiplied by.
InputGroups = Mapping[str, tuple[str, ...]]


def solve_model(
    store: WeightStore,
    config: FalconH1Config,
    rest: QuantizedWeights,
    *,
    ids: Ids,
    stage: Stage,
    progress: Progress,
    device: ComputeDevice = CPU_DEVICE,
    own: Mapping[str, OwnTensor] = MappingProxyType({}),
) -> StoredIntegers:
    """Returns integers by GPTQ for every projection and the head, as far as ``rest`` has precisions for them.

    Args:
        store: the checkpoint.
        config: its architecture.
        rest: the precisions, and integers by plain rounding: an embedding's, and those that the guard finds better.
        ids: calibration tokens [samples, length].
        stage: the place of the scratch file. What an earlier build with the same arguments left there is used.
        progress: receives the name of each layer that is solved.
        device: where layers run and integers are solved. An earlier build must have had the same.
        own: tensors that the target stores in a format of its own, which is what they are solved in.

    Raises:
        H1ExportError: weights or inputs that are not finite, or too large for fp16 scales.
    """
    stage = replace(stage, jobs=device.threads(stage.jobs))
    (stage.folder / SCRATCH).mkdir(exist_ok=True)
    with device.computing(), WeightFile(stage, WORK) as file:
        solver = _Solver(store, config, rest, ids=ids, stage=stage, file=file, device=device, own=own)
        solver.run(progress)
    return solver.integers


class _Solver:
    """GPTQ of one build's model; ``integers`` reads what has been solved so far.

    ``file`` holds the integers of all tensors, and four activations [samples, length, hidden]: the float and the
    quantised input of one layer, and those of the next.
    """

    def __init__(
        self,
        store: WeightStore,
        config: FalconH1Config,
        rest: QuantizedWeights,
        *,
        ids: Ids,
        stage: Stage,
        file: WeightFile,
        device: ComputeDevice,
        own: Mapping[str, OwnTensor],
    ) -> None:
        self._store = store
        self._config = config
        self._ids = ids
        self._stage = stage
        self._device = device
        self._batch = device.sequences(ids.shape[1])
        self._solved_on = len(ids) - held_out(len(ids))  # the sequences after these are the guard's
        self._normed: list[InputPair] = []  # the head's inputs
        self._file = file
        self._head = head_tensor(config)
        layers = range(config.num_hidden_layers)
        projections = [tensor for layer in layers for group in weights_by_input(layer).values() for tensor in group]
        tensors = [tensor for tensor in (*projections, self._head) if tensor in rest.precisions]
        self._solved = SolvedFile(
            store,
            rest,
            own,
            tensors=tensors,
            held=len(ids) - self._solved_on,
            stage=stage,
            file=file,
        )
        self.integers = self._solved.integers
        self._activations_shape = (*ids.shape, config.hidden_size)
        self._activations = [file.reserve("between", 4 * prod(self._activations_shape), ALIGN) for _ in range(4)]

    def run(self, progress: Progress) -> None:
        """Solve what is not in the file yet.

        The first layer that runs is the last one, up to the first unsolved layer, whose inputs are in the file.
        """
        layers = self._config.num_hidden_layers
        unsolved = next((layer for layer in range(layers) if self._unsolved(weights_by_input(layer))), layers)
        if unsolved == layers and not self._solved.lacks(self._head):
            return
        start = next((layer for layer in range(unsolved, 0, -1) if all(map(self._file.holds, self._inputs(layer)))), 0)
        if start == 0:
            self._file.write(
                self._inputs(0),
                (partial(embedded, self._store, self._config, ids) for ids in self._ids),
            )
        for layer in range(start, layers):
            progress.stage(f"GPTQ, layer {layer + 1} of {layers}")
            self._solve_layer(layer, self._unsolved(weights_by_input(layer)))
        if self._solved.lacks(self._head):
            progress.stage("GPTQ, head")
            self._solve_head()
            return_freed_memory()

    def _solve_layer(self, layer: int, groups: InputGroups) -> None:
        """Solve the projections in ``groups``, and write both inputs of the next layer."""
        right = StagedLayer(self._config, layer, read=self._float_weight, device=self._device)
        found = StagedLayer(self._config, layer, read=self._quantised_weight, device=self._device)
        calls: Iterator[Callable[[], Stops]] = (
            partial(started, right, found, pair) for pair in self._sequences(layer, self._batch)
        )
        for stop, names in enumerate(STOPS):
            at = deque(in_order(calls, self._stage.jobs))
            return_freed_memory()
            self._solve_groups({name: groups[name] for name in names if name in groups}, at)
            right.put(stop)
            found.put(stop)
            calls = _advances(right, found, stop, at=at)
        shape = self._activations_shape[1:]
        blocks = (partial(outputs, at, (-1, *shape)) for at in in_order(calls, self._stage.jobs))
        self._file.write(self._inputs(layer + 1), blocks)

    def _solve_groups(self, groups: InputGroups, at: Sequence[Stops]) -> None:
        """Solve and write the projections in ``groups``; ``at`` are the stops of all lots of sequences before them."""
        for name, group in groups.items():
            pairs = [(right.flat(name), found.flat(name)) for right, found in at]
            seen = sum(start < self._solved_on for start, _ in self._lots(self._batch))
            moments = Moments.of(pairs[:seen], self._stage.jobs, device=self._device)
            inverse = _inverse(moments, group[0])
            for tensor in group:
                self._solved.write_projection(tensor, inverse, pairs[seen:])

    def _solve_head(self) -> None:
        """Solve and write the head: each group of rows on its own weighted moments, mixed with the unweighted ones."""
        return_freed_memory()
        head = torch.from_numpy(self._float_weight(self._head)).to(self._device.place)
        grouped = head.bfloat16() if self._device.halves else head
        found = group_head(self._head_inputs, grouped, self._config.lm_head_multiplier, jobs=self._stage.jobs)
        del grouped
        return_freed_memory()
        pairs = list(in_order(self._head_inputs(), self._stage.jobs))
        unweighted = Moments.of(pairs, self._stage.jobs, device=self._device)
        rows_of_groups = [torch.nonzero(found.groups == group)[:, 0].numpy() for group in range(len(found.weights))]
        calls = (
            partial(self._solve_head_rows, head, rows, weights, pairs=pairs, unweighted=unweighted)
            for rows, weights in zip(rows_of_groups, found.weights, strict=True)
        )
        solved = list[Rows]()
        for rows, parts in zip(rows_of_groups, in_order(calls, self._stage.jobs), strict=True):
            solved = solved or [np.empty((len(head), *part.shape[1:]), part.dtype) for part in parts]
            for array, part in zip(solved, parts, strict=True):
                array[rows] = part
        return_freed_memory()
        self._solved.write_head(
            self._head, solved, self._held_inputs, head=head, multiplier=self._config.lm_head_multiplier
        )

    def _held_inputs(self, table: Array) -> list[InputPair]:
        """Returns the head's inputs on the guard's sequences; ``table`` has the head's integers, dequantised.

        Where the head is the embedding too, the quantised inputs are those of a model that has ``table`` as both.
        """
        pairs = [call() for call in self._head_inputs(held=True)]
        if not self._config.tie_word_embeddings:
            return pairs
        hidden = [
            embed(self._store, self._config, ids, read=lambda token: table[token : token + 1])
            for ids in self._ids[self._solved_on :]
        ]
        for layer in range(self._config.num_hidden_layers):
            loaded = LoadedLayer(self._config, layer, read=self._quantised_weight, device=self._device)
            hidden = list(in_order((partial(loaded.output, one) for one in hidden), self._stage.jobs))
        norm = partial(final_norm, self._store, self._config, device=self._device)
        return [(right, norm(one)) for (right, _), one in zip(pairs, hidden, strict=True)]

    def _solve_head_rows(
        self, head: Tensor, rows: Ids, weights: Tensor, *, pairs: Sequence[InputPair], unweighted: Moments
    ) -> tuple[Rows, ...]:
        """Returns the integers of ``rows`` of the head, an array for each of its extents.

        ``weights`` [samples, length] are those of the positions of ``pairs``. The positions that weigh least are left
        out: the unweighted moments have them.
        """
        least = weights.flatten().kthvalue(1 + int((1 - WEIGHING) * weights.numel())).values
        kept = [torch.nonzero(of_sequence >= least)[:, 0] for of_sequence in weights]
        heavy = [
            weighted((pair[0][places], pair[1][places]), of_sequence[places])
            for pair, of_sequence, places in zip(pairs, weights, kept, strict=True)
            if len(places)
        ]
        moments = Moments.of(heavy, device=self._device)
        damping = TIED_DAMPING if self._config.tie_word_embeddings else DAMPING
        inverse = _inverse(moments.mixed(unweighted, UNWEIGHTED_SHARE), self._head, damping)
        step = max(1, SOLVE_BYTES // (4 * head.shape[1]))
        parts = [rows[start : start + step] for start in range(0, len(rows), step)]
        found = [
            self._solved.solved(
                self._head, head[torch.from_numpy(part).to(head.device)].cpu().numpy(), part, inverse=inverse
            )
            for part in parts
        ]
        return tuple(np.concatenate(arrays) for arrays in zip(*found, strict=True))

    def _head_inputs(self, held: bool = False) -> Iterator[Callable[[], InputPair]]:
        """Yield a call for every sequence to solve on, which returns the float and the quantised input of the head.

        Where ``held`` is set, the sequences are the guard's.
        """
        part = slice(self._solved_on, None) if held else slice(self._solved_on)
        norm = partial(final_norm, self._store, self._config, device=self._device)
        pairs = list(self._sequences(self._config.num_hidden_layers))[part]
        calls = (partial(normed_pair, norm, *pair) for pair in pairs)
        if held:
            return calls
        if not self._normed:  # every group of rows reads them
            self._normed = [call() for call in calls]
        return (partial(same_pair, pair) for pair in self._normed)

    def _lots(self, count: int) -> list[tuple[int, int]]:
        """Returns [start, stop) of lots of at most ``count`` sequences; no lot has some of the guard's and others."""
        starts = [*range(0, self._solved_on, count), *range(self._solved_on, len(self._ids), count)]
        return list(zip(starts, [*starts[1:], len(self._ids)], strict=True))

    def _unsolved(self, groups: InputGroups) -> InputGroups:
        """Returns the part of ``groups`` that is to be solved and is not in the file."""
        left = {name: tuple(tensor for tensor in group if self._solved.lacks(tensor)) for name, group in groups.items()}
        return {name: group for name, group in left.items() if group}

    def _inputs(self, layer: int) -> tuple[Extent, Extent]:
        """Returns where the float and the quantised input of ``layer`` are; the number of layers means the head.

        Both are float32 [samples, length, hidden]. Layers take turns in two pairs of extents, whose name tells which
        layer's they hold.
        """
        float_input, quantised_input = self._activations[layer % 2 :: 2]
        return (
            replace(float_input, tensor=f"float input of layer {layer}"),
            replace(quantised_input, tensor=f"quantised input of layer {layer}"),
        )

    def _sequences(self, layer: int, count: int = 1) -> Iterator[tuple[Array, Array]]:
        """Yield the float and the quantised input of every sequence, mapped from the file.

        They are [length, hidden], or [at most count, length, hidden] for a ``count`` of sequences above 1.
        """
        maps = (
            np.memmap(self._stage.folder / extent.file, np.float32, "r", extent.offset, self._activations_shape)
            for extent in self._inputs(layer)
        )
        if count == 1:
            return zip(*maps, strict=True)
        floats, quantised = maps
        return ((floats[start:stop], quantised[start:stop]) for start, stop in self._lots(count))

    def _float_weight(self, tensor: str) -> Array:
        """Returns a tensor as the checkpoint has it."""
        return self._store.rows(tensor, 0, self._store.shape(tensor)[0])

    def _quantised_weight(self, tensor: str) -> Array:
        """Returns a tensor as the artifact will have it, dequantised where it is stored in integers."""
        found = self.integers.unfolded(tensor)
        return self._float_weight(tensor) if found is None else found


def _advances(right: StagedLayer, found: StagedLayer, stop: int, *, at: deque[Stops]) -> Iterator[Callable[[], Stops]]:
    """Yield the calls that advance from the stops ``at``; each is dropped from ``at`` first, so that memory is free."""
    while at:
        yield partial(advance, right, found, stop, at=at.popleft())


def _inverse(moments: Moments, name: str, damping: float = DAMPING) -> Inverse:
    return invert(moments.own, name, moments.drift, damping=damping)
