"""Measure how far the model's predictions move when one tensor alone is stored in integers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from h1export.artifact.weight_file import in_order
from h1export.checkpoint.store import WeightStore
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array, Ids
from h1export.model.falcon_h1.tensors import LM_HEAD
from h1export.progress import Progress
from h1export.quantize.budget import Sensitivity
from h1export.quantize.device import CPU_DEVICE, ComputeDevice
from h1export.quantize.layers import LoadedLayer, embed, head_tensor, logits, weights_by_input
from h1export.quantize.source import QuantizedWeights

ROWS = 128  # positions whose predictions are held in float64 at a time

HiddenStates = list[Array]  # hidden states [length, hidden], one array a sample


def sensitivities(
    store: WeightStore,
    config: FalconH1Config,
    integers: QuantizedWeights,
    *,
    ids: Ids,
    jobs: int,
    progress: Progress,
    device: ComputeDevice = CPU_DEVICE,
) -> dict[str, Sensitivity]:
    """Returns the sensitivity of every tensor among the precisions of ``integers``, on ``ids`` [samples, length].

    Memory holds a layer, the head, and the sequences once for each projection of a layer. No digit depends on ``jobs``,
    the number of threads.
    """
    with device.computing():
        return dict(_Measurement(store, config, integers, jobs=device.threads(jobs), device=device).run(ids, progress))


def _row(table: Array, token: int) -> Array:
    return table[token : token + 1]


class _Measurement:
    def __init__(
        self,
        store: WeightStore,
        config: FalconH1Config,
        integers: QuantizedWeights,
        *,
        jobs: int,
        device: ComputeDevice,
    ) -> None:
        self._store = store
        self._config = config
        self._integers = integers
        self._jobs = jobs
        self._device = device
        self._head = self._on_device(self._read("", head_tensor(config)))

    def run(self, ids: Ids, progress: Progress) -> Iterator[tuple[str, Sensitivity]]:
        layers = self._config.num_hidden_layers
        exact: list[HiddenStates] = [[embed(self._store, self._config, sample) for sample in ids]]
        for layer in range(layers):
            exact.append(self._run_layer(layer, "", exact[-1]))
        for layer in range(layers):
            progress.stage(f"sensitivity, layer {layer + 1} of {layers}")
            tensors = [
                tensor
                for group in weights_by_input(layer).values()
                for tensor in group
                if tensor in self._integers.precisions
            ]
            moved = {tensor: self._run_layer(layer, tensor, exact[layer]) for tensor in tensors}
            for later in range(layer + 1, layers):
                moved = dict(zip(moved, self._run_layer_on_all(later, list(moved.values())), strict=True))
            yield from (
                (tensor, self._result(tensor, exact[-1], hidden, head=self._head)) for tensor, hidden in moved.items()
            )
        head = head_tensor(self._config)
        if head in self._integers.precisions:
            progress.stage("sensitivity, head")
            rounded = self._read(head, head)
            found = exact[-1] if head == LM_HEAD else self._run_on_table(rounded, ids)
            yield head, self._result(head, exact[-1], found, head=self._on_device(rounded))

    def _run_on_table(self, table: Array, ids: Ids) -> HiddenStates:
        """Returns the last layer's output where the embedding, which is the head too, is ``table``."""
        read = partial(_row, table)
        hidden = [embed(self._store, self._config, sample, read=read) for sample in ids]
        for layer in range(self._config.num_hidden_layers):
            hidden = self._run_layer(layer, "", hidden)
        return hidden

    def _on_device(self, weight: Array) -> Tensor:
        return torch.from_numpy(weight).to(self._device.place)

    def _read(self, rounded: str, tensor: str) -> Array:
        """Returns ``tensor`` as the checkpoint has it, or dequantised where it is the one that is ``rounded``."""
        rows = self._store.shape(tensor)[0]
        if tensor == rounded:
            return self._integers.rows(tensor, 0, rows).unfolded()
        return self._store.rows(tensor, 0, rows)

    def _run_layer(self, layer: int, rounded: str, hidden: HiddenStates) -> HiddenStates:
        """Returns a layer's output for the sequences; its tensor ``rounded`` is in integers."""
        return self._run_layer_on_all(layer, [hidden], rounded)[0]

    def _run_layer_on_all(self, layer: int, hidden: list[HiddenStates], rounded: str = "") -> list[HiddenStates]:
        """Returns a layer's output for several lots of sequences, for which it is loaded once."""
        loaded = LoadedLayer(self._config, layer, read=partial(self._read, rounded), device=self._device)
        found = in_order((partial(loaded.output, sample) for sequences in hidden for sample in sequences), self._jobs)
        return [[next(found) for _ in sequences] for sequences in hidden]

    def _result(self, tensor: str, truth: HiddenStates, found: HiddenStates, *, head: Tensor) -> Sensitivity:
        pairs = zip(truth, found, strict=True)
        sums = in_order((partial(self._divergence, *pair, head=head) for pair in pairs), self._jobs)
        rows, columns = self._store.shape(tensor)
        return Sensitivity((rows, columns), self._integers.precisions[tensor], sum(sums) / sum(map(len, truth)))

    def _divergence(self, truth: Array, found: Array, *, head: Tensor) -> float:
        """Returns the sum of KL(truth || found) over the positions of a sequence, in nats.

        ``head`` is the weight for ``found``.
        """
        total = 0.0
        for start in range(0, len(truth), ROWS):
            rows = slice(start, start + ROWS)
            a, b = (
                torch.log_softmax(
                    logits(self._store, self._config, hidden[rows], head=weight, device=self._device).double(), -1
                )
                for hidden, weight in ((found, head), (truth, self._head))
            )
            total += float((b.exp() * (b - a)).sum())
        return total
