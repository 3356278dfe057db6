"""The float model one layer at a time: a layer's weights are read when it runs and dropped with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from h1export.checkpoint.store import WeightStore
from h1export.graphs.model import Layer, layer_states, mup_vector, scaled
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.projections import FINAL_NORM, INPUT_GROUPS
from h1export.model.falcon_h1.states import Array, Ids, StateSpec
from h1export.model.falcon_h1.tensors import EMBEDDING, LM_HEAD, layer_prefix

ReadWeight = Callable[[str], Array]  # checkpoint name -> the whole tensor, float32


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Make torch compute on the calling thread alone: how many threads share a product changes its last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def head_tensor(config: FalconH1Config) -> str:
    """Returns the checkpoint's name of the head's weight, which is the embedding where the two are tied."""
    return EMBEDDING if config.tie_word_embeddings else LM_HEAD


def weights_by_input(layer: int) -> dict[str, tuple[str, ...]]:
    """Returns the projections of a layer by the input that they share: a name of INPUT_GROUPS -> checkpoint tensors."""
    return {
        name: tuple(layer_prefix(layer) + projection.weight for projection in group)
        for name, group in INPUT_GROUPS.items()
    }


def embed(store: WeightStore, config: FalconH1Config, ids: Ids) -> Array:
    """Returns the first layer's input, float32 [seq, hidden]; only the embedding's rows of ``ids`` [seq] are read."""
    used, places = np.unique(ids, return_inverse=True)
    rows = np.concatenate([store.rows(EMBEDDING, token, token + 1) for token in used])
    result: Array = rows[places] * np.float32(config.embedding_multiplier)
    return result


def final_norm(store: WeightStore, config: FalconH1Config, hidden: Array) -> Tensor:
    """Returns the head's input, float32 [seq, hidden], for the last layer's output ``hidden``."""
    weight = torch.from_numpy(store.rows(FINAL_NORM, 0, config.hidden_size))
    return torch.nn.functional.rms_norm(torch.from_numpy(hidden), weight.shape, weight, config.rms_norm_eps)


def logits(store: WeightStore, config: FalconH1Config, hidden: Array, *, head: Array) -> Array:
    """Returns logits [seq, vocab] for the last layer's output ``hidden`` [seq, hidden].

    ``head`` is the head's weight.
    """
    found: Array = scaled(
        final_norm(store, config, hidden) @ torch.from_numpy(head).T, config.lm_head_multiplier
    ).numpy()
    return found


class LoadedLayer:
    """One layer in float32, run on whole sequences from empty states."""

    def __init__(self, store: WeightStore, config: FalconH1Config, layer: int, *, read: ReadWeight) -> None:
        """``read`` gives a tensor of the layer by its checkpoint name."""
        with torch.device("meta"):
            self._layer = Layer(config)
        names = dict(self._layer.named_parameters())
        self._layer.load_state_dict(
            {name: torch.from_numpy(read(layer_prefix(layer) + name)) for name in names}, assign=True
        )
        self._layer.mamba.mup = mup_vector(config)
        empty = StateSpec.of(config).of_layer(0)
        (self._states,) = layer_states([torch.zeros(tensor.sized(1, 0)) for tensor in empty])
        self._thread = threading.local()
        for name in INPUT_GROUPS:
            self._layer.get_submodule(name).register_forward_pre_hook(partial(self._record, name))

    def output(self, hidden: Array) -> Array:
        """Returns the layer's output [seq, hidden] for ``hidden`` [seq, hidden]. Called on any thread."""
        return self.run(hidden)[0]

    def run(self, hidden: Array) -> tuple[Array, Mapping[str, Tensor]]:
        """Returns the layer's output, and the inputs of its projections [seq, columns] by INPUT_GROUPS' names.

        Called on any thread.
        """
        seq = len(hidden)
        inputs = dict[str, Tensor]()
        self._thread.inputs = inputs
        ones = torch.ones(1, seq)
        with torch.no_grad():
            result, _ = self._layer(
                torch.from_numpy(hidden)[None], torch.arange(seq)[None], ones.long(), ones, self._states
            )
        output: Array = result[0].numpy()
        return output, inputs

    def _record(self, name: str, _: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._thread.inputs[name] = arguments[0][0]
