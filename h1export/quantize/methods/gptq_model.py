"""GPTQ of a whole model, layer by layer, so that each layer is quantised for the inputs that it will meet.

Two activations of the calibration text go through the model side by side. The *float* one is what the checkpoint's
weights compute. The *quantised* one is what the layers that are quantised already make of the same text. The steps:

1. Write the embeddings of the calibration text as both inputs of layer 0.
2. For each layer, from the first:
   a. Run the layer with the checkpoint's weights on its float input and on its quantised input. Add up second moments
      of the inputs of every projection: of the quantised input, and of its difference from the float input.
   b. Write the float output as the float input of the next layer.
   c. Invert the moments of every projection input, and solve its projections for integers (gptq.py). The difference of
      the two inputs lets a projection make up for what quantisation did to its input.
   d. Run the layer with its integers on the quantised input, and write the output as that of the next layer.
   e. The guard (guard.py) compares integers with plain ones on sequences that went into no moment.
3. Solve the head's rows in groups (head_groups.py). The moments for a group weigh positions by how much its tokens
   matter there, and are mixed with the moments of all positions alike.

Memory holds one layer. The inputs of two layers, float and quantised, and all integers are in one file in the stage's
scratch folder, so that a build that was killed continues in the layer where it stopped. Bytes do not depend on the
number of threads: each thread computes on its own, and sums are taken in the order of the sequences.
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
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array, Ids
from h1export.progress import Progress
from h1export.quantize.device import CPU_DEVICE, ComputeDevice
from h1export.quantize.grid import OwnTensor
from h1export.quantize.layers import LoadedLayer, embed, final_norm, head_tensor, weights_by_input
from h1export.quantize.methods.gptq import DAMPING, Inverse, invert
from h1export.quantize.methods.guard import held_out
from h1export.quantize.methods.head_groups import InputPair, group_head
from h1export.quantize.methods.layer_runs import (
    RunLayer,
    embedded,
    layer_output,
    normed_pair,
    one_block,
    run_on_both,
    same_pair,
)
from h1export.quantize.methods.moments import Moments
from h1export.quantize.methods.solved_file import SOLVE_BYTES, SolvedFile
from h1export.quantize.methods.stored import ALIGN, StoredIntegers
from h1export.quantize.source import QuantizedWeights

WORK = f"{SCRATCH}/gptq"  # the file of integers and activations, relative to the stage
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
        self._normed: list[InputPair] = []  # the head's inputs, on a GPU
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

    def _solve_layer(self, layer: int, groups: InputGroups) -> None:
        """Solve the projections in ``groups``, and write both inputs of the next layer."""
        (float_input, quantised_input) = self._inputs(layer + 1)
        moments = dict[str, Moments]()
        held = dict[str, list[InputPair]]()
        loaded = LoadedLayer(self._store, self._config, layer, read=self._float_weight, device=self._device)
        outputs = self._float_outputs(loaded.run, layer, groups, moments=moments, held=held)
        if groups and self._file.holds(float_input):  # an earlier build was killed after it had written this
            deque(outputs, maxlen=0)
        else:
            self._file.write([float_input], (partial(one_block, output) for output in outputs))
        self._solve_groups(groups, moments, held)
        quantised = LoadedLayer(self._store, self._config, layer, read=self._quantised_weight, device=self._device)
        self._file.write(
            [quantised_input],
            (partial(layer_output, quantised.output, sequence) for _, sequence in self._sequences(layer, self._batch)),
        )

    def _float_outputs(
        self,
        run: RunLayer,
        layer: int,
        groups: InputGroups,
        *,
        moments: dict[str, Moments],
        held: dict[str, list[InputPair]],
    ) -> Iterator[Array]:
        """Yield the float output of every sequence.

        Meanwhile, ``moments`` gets the moments of the inputs in ``groups``, and ``held`` these inputs themselves where
        the sequence is one of the guard's.
        """
        runs = (
            partial(run_on_both, run, float_input, quantised_input if groups else None)
            for float_input, quantised_input in self._sequences(layer, self._batch)
        )
        for found, (start, _) in zip(in_order(runs, self._stage.jobs), self._lots(self._batch), strict=True):
            for name in groups:
                pair = (found.float_inputs[name], found.quantised_inputs[name])
                if start >= self._solved_on:
                    held.setdefault(name, []).append(pair)
                    continue
                if name not in moments:
                    moments[name] = Moments.zero(pair[1].shape[1], self._device)
                moments[name].add(*pair)
            yield found.output

    def _solve_groups(
        self, groups: InputGroups, moments: dict[str, Moments], held: Mapping[str, Sequence[InputPair]]
    ) -> None:
        """Solve and write the projections in ``groups``.

        ``moments`` is emptied, so that its memory is freed on the way.
        """
        inverses = in_order(
            (partial(_inverse, moments.pop(name), group[0]) for name, group in groups.items()), self._stage.jobs
        )
        for inverse, (name, group) in zip(inverses, groups.items(), strict=True):
            for tensor in group:
                self._solved.write_projection(tensor, inverse, held.get(name, ()))

    def _solve_head(self) -> None:
        """Solve and write the head: each group of rows on its own weighted moments, mixed with the unweighted ones."""
        head = torch.from_numpy(self._float_weight(self._head)).to(self._device.place)
        found = group_head(self._head_inputs, head, self._config.lm_head_multiplier, jobs=self._stage.jobs)
        unweighted = Moments.zero(head.shape[1], self._device)
        for float_input, quantised_input in in_order(self._head_inputs(), self._stage.jobs):
            unweighted.add(float_input, quantised_input)
        rows_of_groups = [torch.nonzero(found.groups == group)[:, 0].numpy() for group in range(len(found.weights))]
        calls = (
            partial(self._solve_head_rows, head, rows, weights, unweighted=unweighted)
            for rows, weights in zip(rows_of_groups, found.weights, strict=True)
        )
        solved = list[Rows]()
        for rows, parts in zip(rows_of_groups, in_order(calls, self._stage.jobs), strict=True):
            solved = solved or [np.empty((len(head), *part.shape[1:]), part.dtype) for part in parts]
            for array, part in zip(solved, parts, strict=True):
                array[rows] = part
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
            loaded = LoadedLayer(self._store, self._config, layer, read=self._quantised_weight, device=self._device)
            hidden = list(in_order((partial(loaded.output, one) for one in hidden), self._stage.jobs))
        norm = partial(final_norm, self._store, self._config, device=self._device)
        return [(right, norm(one)) for (right, _), one in zip(pairs, hidden, strict=True)]

    def _solve_head_rows(self, head: Tensor, rows: Ids, weights: Tensor, *, unweighted: Moments) -> tuple[Rows, ...]:
        """Returns the integers of ``rows`` of the head, an array for each of its extents.

        ``weights`` [samples, length] are those of the positions.
        """
        moments = Moments.zero(head.shape[1], self._device)
        for sequence_weights, inputs in zip(weights, self._head_inputs(), strict=True):
            moments.add(*inputs(), sequence_weights)
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
        if self._device.is_cpu or held:
            return calls
        if not self._normed:  # every group of rows reads them, and a GPU would wait for the copies
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


def _inverse(moments: Moments, name: str, damping: float = DAMPING) -> Inverse:
    return invert(moments.own, name, moments.drift, damping=damping)
