"""Activation-aware scaling: a weight's columns grow with what comes into them, so that rounding spares those that matter.

Source: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023: factors are a power of the
inputs' size, found by a search for the least error of the product. They are folded only where that changes nothing but float32's last
bits: into a norm before a product, or into the rows of a projection whose output is its input but for elementwise factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from h1export.artifact.weight_file import in_order
from h1export.checkpoint.store import WeightStore
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array
from h1export.model.falcon_h1.tensors import FINAL_NORM, LM_HEAD, tensor_layout
from h1export.progress import Progress
from h1export.quantize.awq_scales import AwqScales
from h1export.quantize.layers import LoadedLayer, embed, final_norm, one_thread_each, prefix, products
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.precision import Precision
from h1export.runtime.runner import Ids

# input of products -> what makes it. mamba.out_proj's is made by a norm only where the architecture has one; self_attn.o_proj's are
# values, which are a state of the model and stay what they are
MAKERS: Mapping[str, tuple[str, ...]] = {
    "mamba.in_proj": ("input_layernorm.weight",),
    "self_attn.o_proj": (),
    "mamba.out_proj": ("mamba.norm.weight",),
    "feed_forward.gate_proj": ("pre_ff_layernorm.weight",),
    "feed_forward.down_proj": ("feed_forward.up_proj.weight", "feed_forward.up_proj.bias"),
}
EXPONENTS = tuple(step / 10 for step in range(11))
SEARCH_BYTES = 16 << 20  # of float32 rows that a thread tries at a time


class Fold(NamedTuple):
    """One input: its products' weights, and what makes it."""

    tensors: tuple[str, ...]
    makers: tuple[str, ...]


HEAD = Fold((LM_HEAD,), (FINAL_NORM,))  # a tied one is the embedding too, whose columns nothing may change


def scaling(
    store: WeightStore,
    config: FalconH1Config,
    precisions: Mapping[str, Precision],
    ids: Ids,
    jobs: int,
    progress: Progress,
) -> AwqScales:
    """The factors that leave the least error in products rounded to ``precisions``, on calibration ids [samples, length].

    Memory holds a layer and the sequences that go into it. No digit depends on ``jobs``.
    """
    with one_thread_each():
        return _Search(store, config, precisions, jobs=jobs).run(ids, progress)


def no_scaling(store: WeightStore, config: FalconH1Config, precisions: Mapping[str, Precision]) -> AwqScales:
    """Factors of one, of the shapes that ``scaling`` finds."""
    return _Search(store, config, precisions, jobs=1).ones()


class _Search:
    def __init__(
        self, store: WeightStore, config: FalconH1Config, precisions: Mapping[str, Precision], *, jobs: int
    ) -> None:
        self._store = store
        self._spec = config
        self._precisions = precisions
        self._jobs = jobs
        self._columns: dict[str, Array] = {}
        self._rows: dict[str, Array] = {}

    def run(self, ids: Ids, progress: Progress) -> AwqScales:
        hidden = [embed(self._store, self._spec, sample) for sample in ids]
        for layer in range(self._spec.num_hidden_layers):
            progress.stage(f"scaling, layer {layer + 1} of {self._spec.num_hidden_layers}")
            loaded = LoadedLayer(
                self._store, self._spec, layer, read=lambda name: self._store.rows(name, 0, self._store.shape(name)[0])
            )
            folds = self._folds(layer)
            moments = dict[str, Tensor]()
            for place, (output, inputs) in enumerate(
                in_order((partial(loaded.run, sample) for sample in hidden), self._jobs)
            ):
                hidden[place] = output
                for name in folds:
                    moments[name] = moments.get(name, 0) + inputs[name].T @ inputs[name]
            for name, fold in folds.items():
                self._note(fold, self._best(fold, moments[name]))
        if LM_HEAD in self._precisions:
            seen = [final_norm(self._store, self._spec, sample) for sample in hidden]
            self._note(HEAD, self._best(HEAD, sum((inputs.T @ inputs for inputs in seen), torch.zeros(()))))
        return AwqScales(self._columns, self._rows)

    def ones(self) -> AwqScales:
        folds = [fold for layer in range(self._spec.num_hidden_layers) for fold in self._folds(layer).values()]
        for fold in (*folds, *([HEAD] if LM_HEAD in self._precisions else [])):
            self._note(fold, torch.ones(self._store.shape(fold.tensors[0])[1]))
        return AwqScales(self._columns, self._rows)

    def _folds(self, layer: int) -> dict[str, Fold]:
        """Of a layer, by the input's name: where the factors of some integers can be folded."""
        layout = tensor_layout(self._spec)
        found = dict[str, Fold]()
        for name, tensors in products(layer).items():
            makers = tuple(made for maker in MAKERS[name] if (made := prefix(layer) + maker) in layout)
            if makers and any(tensor in self._precisions for tensor in tensors):
                found[name] = Fold(tensors, makers)
        return found

    def _note(self, fold: Fold, factors: Tensor) -> None:
        self._rows |= dict.fromkeys(fold.makers, factors.numpy())
        self._columns |= dict.fromkeys(fold.tensors, factors.numpy())

    def _best(self, fold: Fold, moments: Tensor) -> Tensor:
        """The factors [columns] of one input."""
        power = moments.diagonal()
        size = 0.5 * torch.log2(power + 1e-8 * power.mean() + torch.finfo(torch.float32).tiny)
        size -= size.mean()
        tried = [torch.exp2(exponent * size) for exponent in EXPONENTS]
        errors = [self._error(fold, factors, moments) for factors in tried]
        return tried[int(np.argmin(errors))]  # the first of equals: no factors at all

    def _error(self, fold: Fold, factors: Tensor, moments: Tensor) -> float:
        """Of the products of one input, summed over outputs and positions, squared."""
        tasks = [
            partial(self._rows_error, tensor, start, stop, factors=factors, moments=moments)
            for tensor in fold.tensors
            if tensor in self._precisions
            for start, stop in self._store.row_ranges([tensor], SEARCH_BYTES)
        ]
        return float(sum(in_order(tasks, self._jobs)))

    def _rows_error(self, tensor: str, start: int, stop: int, *, factors: Tensor, moments: Tensor) -> float:
        weight = self._store.rows(tensor, start, stop)
        scale = factors.numpy()
        rounded = quantize_rows(
            weight * scale, self._precisions[tensor], np.ones(len(weight), np.float32), name=tensor
        ).unfolded()
        error = torch.from_numpy(rounded / scale - weight)
        return float(((error @ moments) * error).sum(dtype=torch.float64))
