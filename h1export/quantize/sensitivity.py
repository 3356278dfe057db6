"""How far the model's predictions move when one tensor alone is stored in integers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from h1export.artifact.weight_file import in_order
from h1export.checkpoint.store import WeightStore
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array
from h1export.progress import Progress
from h1export.quantize.budget import Sensitivity
from h1export.quantize.layers import LoadedLayer, embed, head_tensor, logits, one_thread_each, products
from h1export.quantize.source import QuantizedWeights
from h1export.runtime.runner import Ids

ROWS = 128  # positions whose predictions are held in float64 at a time

Sequences = list[Array]  # hidden states [length, hidden], one a sample


def sensitivities(
    store: WeightStore, config: FalconH1Config, integers: QuantizedWeights, *, ids: Ids, jobs: int, progress: Progress
) -> dict[str, Sensitivity]:
    """Of every product's weight among the precisions of ``integers``, on ``ids`` [samples, length].

    Memory holds a layer, the head, and the sequences once for each product of a layer. No digit depends on ``jobs``.
    """
    with one_thread_each():
        return dict(_Measured(store, config, integers, jobs=jobs).run(ids, progress))


class _Measured:
    def __init__(self, store: WeightStore, config: FalconH1Config, integers: QuantizedWeights, *, jobs: int) -> None:
        self._store = store
        self._spec = config
        self._integers = integers
        self._jobs = jobs
        self._head = self._read("", head_tensor(config))

    def run(self, ids: Ids, progress: Progress) -> Iterator[tuple[str, Sensitivity]]:
        layers = self._spec.num_hidden_layers
        full: list[Sequences] = [[embed(self._store, self._spec, sample) for sample in ids]]
        for layer in range(layers):
            full.append(self._through(layer, "", full[-1]))
        for layer in range(layers):
            progress.stage(f"sensitivity, layer {layer + 1} of {layers}")
            tensors = [
                tensor for group in products(layer).values() for tensor in group if tensor in self._integers.precisions
            ]
            moved = {tensor: self._through(layer, tensor, full[layer]) for tensor in tensors}
            for later in range(layer + 1, layers):
                moved = dict(zip(moved, self._together(later, list(moved.values())), strict=True))
            yield from (
                (tensor, self._result(tensor, full[-1], hidden, head=self._head)) for tensor, hidden in moved.items()
            )
        head = head_tensor(self._spec)
        if head in self._integers.precisions:
            progress.stage("sensitivity, head")
            yield head, self._result(head, full[-1], full[-1], head=self._read(head, head))

    def _read(self, rounded: str, tensor: str) -> Array:
        """A tensor as the checkpoint has it, or in integers where it is the one ``rounded``."""
        rows = self._store.shape(tensor)[0]
        return (
            self._integers.rows(tensor, 0, rows).unfolded() if tensor == rounded else self._store.rows(tensor, 0, rows)
        )

    def _through(self, layer: int, rounded: str, hidden: Sequences) -> Sequences:
        return self._together(layer, [hidden], rounded)[0]

    def _together(self, layer: int, hidden: list[Sequences], rounded: str = "") -> list[Sequences]:
        loaded = LoadedLayer(self._store, self._spec, layer, read=partial(self._read, rounded))
        found = in_order((partial(loaded.output, sample) for sequences in hidden for sample in sequences), self._jobs)
        return [[next(found) for _ in sequences] for sequences in hidden]

    def _result(self, tensor: str, truth: Sequences, found: Sequences, *, head: Array) -> Sensitivity:
        pairs = zip(truth, found, strict=True)
        sums = in_order((partial(self._divergence, *pair, head) for pair in pairs), self._jobs)
        rows, columns = self._store.shape(tensor)
        return Sensitivity((rows, columns), self._integers.precisions[tensor], sum(sums) / sum(map(len, truth)))

    def _divergence(self, truth: Array, found: Array, head: Array) -> float:
        """The sum of KL(truth || found) over the positions of a sequence; ``head`` is that of ``found``."""
        total = 0.0
        for start in range(0, len(truth), ROWS):
            rows = slice(start, start + ROWS)
            a, b = (
                torch.log_softmax(torch.from_numpy(logits(self._store, self._spec, hidden[rows], weight)).double(), -1)
                for hidden, weight in ((found, head), (truth, self._head))
            )
            total += float((b.exp() * (b - a)).sum())
        return total
