"""Steps that follow a method: they tune its integers so that the model predicts what the full model does.

Each step minimises the KL divergence of the predictions from the full model's on the calibration text: ``round`` by
moving codes, ``scales`` by moving scales (tuned_values.py). Codes and scales stay within the integer rule. An update:

1. Run some sequences through the layers with the integers so far, and keep the inputs of all layers.
2. Take the divergence of the predictions, and its gradient at the head and at the head's input.
3. From the last layer to the first, run the layer again and differentiate it: by its weights, and by its input, which
   is what the layer before needs. Move what the step tunes of this layer at once.

So memory holds one layer with its gradients, the inputs of all layers for a batch, and the values of the step. After a
step the guard compares the divergence on held-out sequences (guard.py) with what it was before, and drops a step that
has not lowered it. A build that was killed goes on from the last SAVED_EVERY updates. Bytes do not depend on the number
of threads: each sequence is computed on one, and gradients are added up in the order of the sequences.

Tensors in a target's own format stay as the method has solved them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from h1export.artifact.journal import SCRATCH
from h1export.artifact.stage import Stage
from h1export.artifact.weight_file import Rows, WeightFile, in_order
from h1export.checkpoint.store import WeightStore
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.projections import FINAL_NORM
from h1export.model.falcon_h1.states import Array, Ids
from h1export.model.falcon_h1.tensors import EMBEDDING, layer_prefix
from h1export.plugins import gradients
from h1export.progress import Progress
from h1export.quantize.choices import Step
from h1export.quantize.device import CPU_DEVICE, ComputeDevice
from h1export.quantize.layers import LoadedLayer, ReadWeight, embed, final_norm, head_tensor, weights_by_input
from h1export.quantize.methods.guard import ERRORS, Errors, divergence, held_out, is_worse
from h1export.quantize.methods.head_groups import POSITIONS
from h1export.quantize.methods.moments import InputPair
from h1export.quantize.methods.stored import ALIGN, StoredIntegers, StoredMatrix
from h1export.quantize.methods.tuned_values import STEPS, CodeValues, ScaleValues, Values
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.quantize.source import QuantizedWeights
from h1export.writing import write_file

WORK = f"{SCRATCH}/tuned"  # the file of integers, relative to the stage
BATCH = 4  # sequences of an update
SEED = 0
SAVED_EVERY = 10  # updates


def tune_model(
    store: WeightStore,
    config: FalconH1Config,
    before: QuantizedWeights,
    *,
    steps: Sequence[Step],
    ids: Ids,
    stage: Stage,
    progress: Progress,
    device: ComputeDevice = CPU_DEVICE,
) -> tuple[QuantizedWeights, dict[Step, Errors]]:
    """Returns the integers ``before`` after some ``steps``, and the divergences after and before each of them.

    The divergences are sums over the guard's positions, in nats; a step that has not lowered it is dropped.

    Args:
        store: the checkpoint.
        config: its architecture.
        before: the integers that are tuned; tensors that no product reads, and those in a format of a target's own,
            stay as they are.
        steps: what is tuned, in order.
        ids: calibration tokens [samples, length].
        stage: the place of the scratch files. What an earlier build with the same arguments left there is used.
        progress: receives the name of each step.
        device: where layers run. Values are moved on the CPU.
    """
    stage = replace(stage, jobs=device.threads(stage.jobs))
    (stage.folder / SCRATCH).mkdir(exist_ok=True)
    gradients.register()
    found = dict[Step, Errors]()
    with device.computing(), WeightFile(stage, WORK) as file:
        tuner = _Tuner(store, config, before, ids=ids, stage=stage, device=device)
        for place, step in enumerate(steps):
            matrices = {name: _reserved(file, f"{place}.{name}", tensor) for name, tensor in tuner.tensors.items()}
            judged = file.reserve(f"{place}.errors", 8 * ERRORS, ALIGN)
            extents = [extent for matrix in matrices.values() for extent in (matrix.codes, matrix.scales)]
            if not all(map(file.holds, (*extents, judged))):
                errors = tuner.run(step, place, progress)
                arrays: list[Rows] = [array for one in tuner.tensors.values() for array in (one.codes, one.scales)]
                file.write([*extents, judged], [partial(tuple, [*arrays, errors])])
            stored = StoredIntegers(stage.folder, matrices, before, errors={f"{step}": judged})
            found[step] = stored.errors_of(step)
            tuner.tensors = {name: stored.rows(name, 0, store.shape(name)[0]) for name in matrices}
    blocks = before.blocks if isinstance(before, StoredIntegers) else {}
    return StoredIntegers(stage.folder, matrices, before, blocks), found


def _reserved(file: WeightFile, name: str, tensor: QuantizedTensor) -> StoredMatrix:
    rows, columns = tensor.codes.shape
    return StoredMatrix.reserved(file, name, (rows, columns), groups=tensor.scales.shape[1])


class _Tuner:
    """The integers that are tuned: ``tensors``, by checkpoint name."""

    def __init__(
        self,
        store: WeightStore,
        config: FalconH1Config,
        before: QuantizedWeights,
        *,
        ids: Ids,
        stage: Stage,
        device: ComputeDevice,
    ) -> None:
        self._store = store
        self._config = config
        self._before = before
        self._ids = ids
        self._stage = stage
        self._device = device
        self._tuned_on = len(ids) - held_out(len(ids))  # the sequences after these are the guard's
        self._head = head_tensor(config)
        self._layers = range(config.num_hidden_layers)
        names = [name for layer in self._layers for group in weights_by_input(layer).values() for name in group]
        own = before.blocks if isinstance(before, StoredIntegers) else {}
        self.tensors = {
            name: before.rows(name, 0, store.shape(name)[0])
            for name in (*names, self._head)
            if name in before.precisions and name not in own
        }
        self._values: Mapping[str, Values] = {}
        self._right: list[Tensor] = []

    def run(self, step: Step, place: int, progress: Progress) -> Errors:
        """Tune what ``step`` does, the ``place``-th; returns the divergences after and before it.

        Where the guard finds it worse, ``tensors`` stay as they were.
        """
        if not self._right:
            progress.stage("predictions of the full model")
            self._right = list(self._final(range(len(self._ids)), tuned=False))
        weight = torch.from_numpy(self._float_weight(self._head)).to(self._device.place)
        before = self._divergence(weight)
        if step == "scales":
            self._values = {name: ScaleValues.of(tensor) for name, tensor in self.tensors.items()}
        else:
            self._values = {
                name: CodeValues.of(tensor, self._float_weight(name), self._before.precisions[name].top)
                for name, tensor in self.tensors.items()
            }
        saved = self._stage.folder / SCRATCH / f"{place}.{step}.safetensors"
        for update in range(self._load(saved), STEPS[step]):
            progress.stage(f"{step}, update {update + 1} of {STEPS[step]}")
            self._update(update, weight)
            if (update + 1) % SAVED_EVERY == 0:
                self._save(saved, update + 1)
        old = self.tensors
        self.tensors = {name: values.integers() for name, values in self._values.items()}
        self._values = {}
        errors = np.array([self._divergence(weight), before])
        if is_worse(errors):
            self.tensors = old
        saved.unlink(missing_ok=True)
        return errors

    def _save(self, file: Path, updates: int) -> None:
        """Write what a later build needs to go on after so many ``updates``."""
        state = {f"{name}:{kind}": v for name, values in self._values.items() for kind, v in values.state.items()}
        write_file(file, save({**state, "updates": torch.tensor(updates)}))

    def _load(self, file: Path) -> int:
        """Returns how many updates an earlier build has saved, and takes its values; 0 where there are none."""
        if not file.is_file():
            return 0
        state = load_file(file)
        for name, values in self._values.items():
            values.state.update({kind: state[f"{name}:{kind}"] for kind in values.state})
        return int(state["updates"])

    def _batch(self, update: int) -> list[int]:
        """Returns the sequences of an update: each once in a round over all, in a random order."""
        found = list[int]()
        for place in range(update * BATCH, (update + 1) * BATCH):
            turn, index = divmod(place, self._tuned_on)
            found.append(int(np.random.default_rng((SEED, turn)).permutation(self._tuned_on)[index]))
        return found

    def _update(self, update: int, right: Tensor) -> None:
        """Move all values once; ``right`` is the head's weight in the checkpoint."""
        chosen = self._batch(update)
        inputs = [[self._embedded(sample, tuned=True) for sample in chosen]]
        for layer in self._layers:
            loaded = self._loaded(layer, self._weight)
            inputs.append(list(in_order((partial(loaded.output, hidden) for hidden in inputs[-1]), self._stage.jobs)))
        head = torch.from_numpy(self._weight(self._head)).to(self._device.place)
        norm = torch.from_numpy(self._float_weight(FINAL_NORM)).to(self._device.place)
        share = 1 / (len(chosen) * self._ids.shape[1])
        calls = (
            partial(self._head_gradients, hidden, self._right[sample], right, head=head, norm=norm, share=share)
            for hidden, sample in zip(inputs.pop(), chosen, strict=True)
        )
        outer = list[Array]()
        of_head = torch.zeros_like(head)
        for gradient, weights in in_order(calls, self._stage.jobs):
            outer.append(gradient)
            of_head += weights
        for layer in reversed(self._layers):
            outer = self._move_layer(layer, inputs.pop(), outer, update=update)
        if self._config.tie_word_embeddings:
            for sample, gradient in zip(chosen, outer, strict=True):
                rows = torch.from_numpy(gradient * np.float32(self._config.embedding_multiplier)).to(head.device)
                of_head.index_put_((torch.from_numpy(self._ids[sample]).to(head.device),), rows, accumulate=True)
        if self._head in self._values:
            self._values[self._head].update(of_head.cpu(), update)

    def _move_layer(self, layer: int, inputs: list[Array], outer: list[Array], *, update: int) -> list[Array]:
        """Move the values of a layer, and return the gradients of its inputs for those of its outputs, ``outer``."""
        loaded = self._loaded(layer, self._weight)
        prefix = layer_prefix(layer)
        names = [name for name in self._values if name.startswith(prefix)]
        short = [name.removeprefix(prefix) for name in names]
        calls = (partial(loaded.gradients, *pair, short) for pair in zip(inputs, outer, strict=True))
        sums: list[Tensor] = []
        found = list[Array]()
        for gradient, weights in in_order(calls, self._stage.jobs):
            found.append(gradient)
            sums = list(weights) if not sums else [a.add_(b) for a, b in zip(sums, weights, strict=True)]
        for name, weight in zip(names, sums, strict=True):
            self._values[name].update(weight.cpu(), update)
        return found

    def _head_gradients(
        self, hidden: Array, normed: Tensor, right: Tensor, *, head: Tensor, norm: Tensor, share: float
    ) -> tuple[Array, Tensor]:
        """Returns the gradients of the divergence by the last layer's output [length, hidden], and by ``head``.

        ``normed`` is the full model's input of the head. The divergence counts ``share`` for each position.
        """
        values = torch.from_numpy(hidden).to(head.device).requires_grad_()
        with torch.enable_grad():
            inner = torch.nn.functional.rms_norm(values, norm.shape, norm, self._config.rms_norm_eps)
        own = inner.detach()
        multiplier = self._config.lm_head_multiplier
        of_head = torch.zeros_like(head)
        of_inner = torch.empty_like(own)
        for start in range(0, len(own), POSITIONS):
            rows = slice(start, start + POSITIONS)
            wanted = torch.softmax(multiplier * (normed[rows] @ right.T), dim=1)
            found = torch.softmax(multiplier * (own[rows] @ head.T), dim=1)
            error = found.sub_(wanted).mul_(multiplier * share)
            of_inner[rows] = error @ head
            of_head.addmm_(error.T, own[rows])
        (of_values,) = torch.autograd.grad(inner, values, of_inner)
        gradient: Array = of_values.cpu().numpy()
        return gradient, of_head

    def _divergence(self, right: Tensor) -> float:
        """Returns the divergence on the guard's sequences with ``tensors`` as they are; ``right`` is the full head."""
        held = range(self._tuned_on, len(self._ids))
        if not held:
            return 0.0
        pairs: list[InputPair] = list(zip(self._right[self._tuned_on :], self._final(held, tuned=True), strict=True))
        head = torch.from_numpy(self._weight(self._head)).to(self._device.place)
        return divergence(pairs, right, head, multiplier=self._config.lm_head_multiplier)

    def _final(self, samples: range, *, tuned: bool) -> list[Tensor]:
        """Returns the head's input for some sequences, by the integers so far where ``tuned``, or the full model's."""
        hidden = [self._embedded(sample, tuned=tuned) for sample in samples]
        for layer in self._layers:
            loaded = self._loaded(layer, self._weight if tuned else self._float_weight)
            hidden = list(in_order((partial(loaded.output, one) for one in hidden), self._stage.jobs))
        return [final_norm(self._store, self._config, one, device=self._device) for one in hidden]

    def _embedded(self, sample: int, *, tuned: bool) -> Array:
        # a table of its own is int8 at the least, and loses nothing to speak of
        if not (tuned and EMBEDDING in self.tensors):
            return embed(self._store, self._config, self._ids[sample])
        table = self._integers(EMBEDDING)
        return embed(self._store, self._config, self._ids[sample], read=partial(_row, table))

    def _loaded(self, layer: int, read: ReadWeight) -> LoadedLayer:
        return LoadedLayer(self._config, layer, read=read, device=self._device)

    def _integers(self, tensor: str) -> QuantizedTensor:
        values = self._values.get(tensor)
        return self.tensors[tensor] if values is None else values.integers()

    def _float_weight(self, tensor: str) -> Array:
        return self._store.rows(tensor, 0, self._store.shape(tensor)[0])

    def _weight(self, tensor: str) -> Array:
        """Returns a tensor as the artifact would have it now."""
        if tensor in self.tensors:
            return self._integers(tensor).unfolded()
        blocks = self._before.unfolded(tensor) if isinstance(self._before, StoredIntegers) else None
        return self._float_weight(tensor) if blocks is None else blocks


def _row(table: QuantizedTensor, token: int) -> Array:
    rows = slice(token, token + 1)
    return QuantizedTensor(table.codes[rows], table.scales[rows], table.row_scale[rows]).unfolded()
