"""The float model one layer at a time: a layer's weights are read when it runs and dropped with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from h1export.checkpoint.store import WeightStore
from h1export.graphs.model import Layer, layer_states, mup_vector, scaled
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.projections import FINAL_NORM, INPUT_GROUPS
from h1export.model.falcon_h1.states import Array, Ids, StateSpec
from h1export.model.falcon_h1.tensors import EMBEDDING, LM_HEAD, layer_prefix
from h1export.quantize.device import CPU_DEVICE, ComputeDevice

ReadWeight = Callable[[str], Array]  # checkpoint name -> the whole tensor, float32
ReadRow = Callable[[int], Array]  # token -> its row of the embedding, float32 [1, hidden]


def head_tensor(config: FalconH1Config) -> str:
    """Returns the checkpoint's name of the head's weight, which is the embedding where the two are tied."""
    return EMBEDDING if config.tie_word_embeddings else LM_HEAD


def weights_by_input(layer: int) -> dict[str, tuple[str, ...]]:
    """Returns the projections of a layer by the input that they share: a name of INPUT_GROUPS -> checkpoint tensors."""
    return {
        name: tuple(layer_prefix(layer) + projection.weight for projection in group)
        for name, group in INPUT_GROUPS.items()
    }


def embed(store: WeightStore, config: FalconH1Config, ids: Ids, *, read: ReadRow | None = None) -> Array:
    """Returns the first layer's input, float32 [seq, hidden]; only the embedding's rows of ``ids`` [seq] are read.

    They are the checkpoint's, or what ``read`` gives where it is given.
    """
    used, places = np.unique(ids, return_inverse=True)
    row = read or (lambda token: store.rows(EMBEDDING, token, token + 1))
    rows = np.concatenate([row(int(token)) for token in used])
    result: Array = rows[places] * np.float32(config.embedding_multiplier)
    return result


def final_norm(
    store: WeightStore, config: FalconH1Config, hidden: Array, *, device: ComputeDevice = CPU_DEVICE
) -> Tensor:
    """Returns the head's input, float32 [seq, hidden] on ``device``, for the last layer's output ``hidden``."""
    weight = torch.from_numpy(store.rows(FINAL_NORM, 0, config.hidden_size)).to(device.place)
    values = torch.from_numpy(hidden).to(device.place)
    return torch.nn.functional.rms_norm(values, weight.shape, weight, config.rms_norm_eps)


def logits(
    store: WeightStore, config: FalconH1Config, hidden: Array, *, head: Tensor, device: ComputeDevice = CPU_DEVICE
) -> Tensor:
    """Returns logits [seq, vocab] for the last layer's output ``hidden`` [seq, hidden].

    ``head`` is the head's weight, on ``device`` as the result is.
    """
    return scaled(final_norm(store, config, hidden, device=device) @ head.T, config.lm_head_multiplier)


class LoadedLayer:
    """One layer in float32, run on whole sequences from empty states."""

    def __init__(
        self,
        config: FalconH1Config,
        layer: int,
        *,
        read: ReadWeight,
        device: ComputeDevice = CPU_DEVICE,
    ) -> None:
        """``read`` gives a tensor of the layer by its checkpoint name; the layer runs on ``device``."""
        self._place = device.place
        with torch.device("meta"):
            self._layer = Layer(config)
        names = dict(self._layer.named_parameters())
        self._layer.load_state_dict(
            {name: torch.from_numpy(read(layer_prefix(layer) + name)).to(self._place) for name in names}, assign=True
        )
        self._layer.mamba.mup = mup_vector(config).to(self._place)
        self._empty = StateSpec.of(config).of_layer(0)
        self._thread = threading.local()
        for name in INPUT_GROUPS:
            # no method: a layer that refers to itself is kept, with its weights, until Python looks for cycles
            self._layer.get_submodule(name).register_forward_pre_hook(partial(_record, self._thread, name))

    def output(self, hidden: Array) -> Array:
        """Returns the layer's output for ``hidden``, both [seq, hidden] or [n, seq, hidden]. Called on any thread."""
        return self.run(hidden)[0]

    def run(self, hidden: Array) -> tuple[Array, Mapping[str, Tensor]]:
        """Returns the layer's output for one sequence or n, and the inputs of its projections by INPUT_GROUPS' names.

        ``hidden`` and the output are [seq, hidden] or [n, seq, hidden]. The inputs stay on the device, as
        [seq, columns] or [n * seq, columns]. Called on any thread.
        """
        values = torch.from_numpy(hidden.reshape(-1, *hidden.shape[-2:])).to(self._place)
        with torch.no_grad():
            result = self._outputs(values)
        output: Array = result.reshape(hidden.shape).cpu().numpy()
        return output, self._thread.inputs

    def gradients(self, hidden: Array, outer: Array, names: Sequence[str]) -> tuple[Array, Sequence[Tensor]]:
        """Returns the gradients by ``hidden`` [seq, hidden], and by the weights ``names`` of the layer.

        ``outer`` [seq, hidden] is the gradient by the layer's output. Needs plugins.gradients. Called on any thread.
        """
        values = torch.from_numpy(hidden[None]).to(self._place).requires_grad_()
        parameters = dict(self._layer.named_parameters())
        with torch.enable_grad():
            result = self._outputs(values)
        wanted = [values, *(parameters[name] for name in names)]
        found, *of_weights = torch.autograd.grad(result, wanted, torch.from_numpy(outer[None]).to(self._place))
        gradient: Array = found[0].cpu().numpy()
        return gradient, of_weights

    def _outputs(self, values: Tensor) -> Tensor:
        """Returns the layer's output for ``values``, both [n, seq, hidden]; the inputs of projections are recorded."""
        count, seq = values.shape[:2]
        self._thread.inputs = dict[str, Tensor]()
        ones = torch.ones(count, seq, device=self._place)
        positions = torch.arange(seq, device=self._place).expand(count, seq)
        (states,) = layer_states([torch.zeros(state.sized(count, 0), device=self._place) for state in self._empty])
        result, _ = self._layer(values, positions, ones.long(), ones, states)
        found: Tensor = result
        return found


def _record(thread: Any, name: str, _: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
    thread.inputs[name] = arguments[0].flatten(0, 1)
