"""Activation-aware scaling: columns of a weight that meet large inputs are enlarged before they are rounded.

Source: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023: factors are
a power of the inputs' size, and a search finds the power that leaves the least error in the product. A factor on a
column is undone in what produces that column of the input: in the norm before a projection, or in the rows of a
projection whose output is the input but for elementwise factors (``ProjectionInput.produced_by``). So the model's
function changes by float32 rounding only. Factors that leave a larger error than none do on the guard's sequences
(guard.py) are dropped.
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
from h1export.model.falcon_h1.projections import HEAD, INPUT_GROUPS
from h1export.model.falcon_h1.states import Array, Ids
from h1export.model.falcon_h1.tensors import LM_HEAD, layer_prefix, tensor_shapes
from h1export.progress import Progress
from h1export.quantize.awq_scales import AwqScales
from h1export.quantize.device import CPU_DEVICE, ComputeDevice
from h1export.quantize.layers import LoadedLayer, embed, final_norm, weights_by_input
from h1export.quantize.methods.guard import Errors, GuardRecord, held_out, is_worse
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.precision import Precision

EXPONENTS = tuple(step / 10 for step in range(11))
SEARCH_BYTES = 16 << 20  # bytes of the float32 rows that a thread tries at a time


class ScaledInput(NamedTuple):
    """An input whose columns can be scaled: the weights that it is multiplied by, and the tensors that produce it."""

    tensors: tuple[str, ...]
    produced_by: tuple[str, ...]


# LM_HEAD is missing where the head is tied: it is the embedding then, whose columns must not be scaled.
HEAD_SCALED = ScaledInput((LM_HEAD,), HEAD.input.produced_by)


def search_scales(
    store: WeightStore,
    config: FalconH1Config,
    precisions: Mapping[str, Precision],
    *,
    ids: Ids,
    jobs: int,
    progress: Progress,
    device: ComputeDevice = CPU_DEVICE,
) -> AwqScales:
    """Returns the factors that leave the least error in products rounded to ``precisions``.

    ``ids`` [samples, length] are calibration tokens. Memory holds a layer and the sequences that go into it. No digit
    depends on ``jobs``, the number of threads. Layers run on ``device``, and products of moments are computed there.
    """
    with device.computing():
        return _Search(store, config, precisions, jobs=jobs, device=device).run(ids, progress)


def unit_scales(store: WeightStore, config: FalconH1Config, precisions: Mapping[str, Precision]) -> AwqScales:
    """Returns factors of one, of the names and shapes that ``search_scales`` finds."""
    return _Search(store, config, precisions, jobs=1).ones()


class _Search:
    def __init__(
        self,
        store: WeightStore,
        config: FalconH1Config,
        precisions: Mapping[str, Precision],
        *,
        jobs: int,
        device: ComputeDevice = CPU_DEVICE,
    ) -> None:
        self._store = store
        self._config = config
        self._precisions = precisions
        self._jobs = jobs
        self._device = device
        self._columns: dict[str, Array] = {}
        self._rows: dict[str, Array] = {}
        self._plain: dict[str, Errors] = {}

    def run(self, ids: Ids, progress: Progress) -> AwqScales:
        searched_on = len(ids) - held_out(len(ids))
        hidden = [embed(self._store, self._config, sample) for sample in ids]
        for layer in range(self._config.num_hidden_layers):
            progress.stage(f"scaling, layer {layer + 1} of {self._config.num_hidden_layers}")
            loaded = LoadedLayer(
                self._config,
                layer,
                read=lambda name: self._store.rows(name, 0, self._store.shape(name)[0]),
                device=self._device,
            )
            scaled = self._scaled_inputs(layer)
            moments = dict[str, Tensor]()
            held = dict[str, Tensor]()
            runs = in_order((partial(loaded.run, sample) for sample in hidden), self._device.threads(self._jobs))
            for place, (output, inputs) in enumerate(runs):
                hidden[place] = output
                sums = moments if place < searched_on else held
                for name in scaled:
                    sums[name] = sums.get(name, 0) + inputs[name].T @ inputs[name]
            for name, scaled_input in scaled.items():
                self._keep(scaled_input, self._judged(scaled_input, moments[name], held.get(name)))
        if LM_HEAD in self._precisions:
            inputs_of_head = [final_norm(self._store, self._config, sample, device=self._device) for sample in hidden]
            total, of_held = (
                sum((inputs.T @ inputs for inputs in part), torch.zeros((), device=self._device.place))
                for part in (inputs_of_head[:searched_on], inputs_of_head[searched_on:])
            )
            self._keep(HEAD_SCALED, self._judged(HEAD_SCALED, total, of_held if of_held.ndim else None))
        return AwqScales(self._columns, self._rows, GuardRecord(len(ids) - searched_on, self._plain))

    def ones(self) -> AwqScales:
        layers = range(self._config.num_hidden_layers)
        scaled = [found for layer in layers for found in self._scaled_inputs(layer).values()]
        for scaled_input in (*scaled, *([HEAD_SCALED] if LM_HEAD in self._precisions else [])):
            self._keep(scaled_input, torch.ones(self._store.shape(scaled_input.tensors[0])[1]))
        return AwqScales(self._columns, self._rows)

    def _scaled_inputs(self, layer: int) -> dict[str, ScaledInput]:
        """Returns the inputs of a layer that can be scaled, by group, where one of their weights is quantised."""
        shapes = tensor_shapes(self._config)
        found = dict[str, ScaledInput]()
        for name, tensors in weights_by_input(layer).items():
            named = (layer_prefix(layer) + tensor for tensor in INPUT_GROUPS[name][0].input.produced_by)
            produced_by = tuple(tensor for tensor in named if tensor in shapes)
            if produced_by and any(tensor in self._precisions for tensor in tensors):
                found[name] = ScaledInput(tensors, produced_by)
        return found

    def _keep(self, scaled: ScaledInput, factors: Tensor) -> None:
        found = factors.cpu().numpy()
        self._rows |= dict.fromkeys(scaled.produced_by, found)
        self._columns |= dict.fromkeys(scaled.tensors, found)

    def _judged(self, scaled: ScaledInput, moments: Tensor, held: Tensor | None) -> Tensor:
        """Returns the best factors for an input, or ones where the guard finds these better.

        ``held`` are the second moments on the guard's sequences; None where it has none.
        """
        best = self._best(scaled, moments)
        ones = torch.ones_like(best)
        if held is None or torch.equal(best, ones):
            return best
        errors = np.array([self._error(scaled, factors, held) for factors in (best, ones)])
        if not is_worse(errors):
            return best
        self._plain |= dict.fromkeys((tensor for tensor in scaled.tensors if tensor in self._precisions), errors)
        return ones

    def _best(self, scaled: ScaledInput, moments: Tensor) -> Tensor:
        """Returns the best factors [columns] for an input with these second moments [columns, columns]."""
        power = moments.diagonal()
        size = 0.5 * torch.log2(power + 1e-8 * power.mean() + torch.finfo(torch.float32).tiny)
        size -= size.mean()
        tried = [torch.exp2(exponent * size) for exponent in EXPONENTS]
        errors = [self._error(scaled, factors, moments) for factors in tried]
        return tried[int(np.argmin(errors))]  # the first of equals, which is no scaling at all

    def _error(self, scaled: ScaledInput, factors: Tensor, moments: Tensor) -> float:
        """Returns the squared error of the input's products, summed over outputs and positions."""
        tasks = [
            partial(self._rows_error, tensor, start, stop, factors=factors, moments=moments)
            for tensor in scaled.tensors
            if tensor in self._precisions
            for start, stop in self._store.row_ranges([tensor], SEARCH_BYTES)
        ]
        return float(sum(in_order(tasks, self._jobs)))

    def _rows_error(self, tensor: str, start: int, stop: int, *, factors: Tensor, moments: Tensor) -> float:
        weight = self._store.rows(tensor, start, stop)
        scale = factors.cpu().numpy()
        rounded = quantize_rows(
            weight * scale, self._precisions[tensor], np.ones(len(weight), np.float32), name=tensor
        ).unfolded()
        error = torch.from_numpy(rounded / scale - weight).to(moments.device)
        return float(((error @ moments) * error).sum(dtype=torch.float64))
