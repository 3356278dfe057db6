"""The model, a layer at a time: weights come from the store when a layer's turn has come, and go with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from h1export.checkpoint.store import WeightStore
from h1export.graphs.model import Layer, LayerStates, mup_vector, scaled
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array, StateSpec
from h1export.model.falcon_h1.tensors import EMBEDDING, FINAL_NORM, LM_HEAD
from h1export.runtime.runner import Ids

# the products of one input (but for a factor, which changes no integer): its name is the first one's
INPUTS: Mapping[str, tuple[str, ...]] = {
    "mamba.in_proj": ("mamba.in_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mamba.out_proj": ("mamba.out_proj",),
    "feed_forward.gate_proj": ("feed_forward.gate_proj", "feed_forward.up_proj"),
    "feed_forward.down_proj": ("feed_forward.down_proj",),
}

ReadWeight = Callable[[str], Array]


@contextmanager
def one_thread_each() -> Iterator[None]:
    """torch computes on the thread that calls it: how many share a product changes its last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def prefix(layer: int) -> str:
    """Of a layer's tensors in the checkpoint."""
    return f"model.layers.{layer}."


def head_tensor(config: FalconH1Config) -> str:
    """The checkpoint's name of the head's weight."""
    return EMBEDDING if config.tie_word_embeddings else LM_HEAD


def products(layer: int) -> dict[str, tuple[str, ...]]:
    """Input of a product -> the weights of a layer that it is multiplied by, by their checkpoint names."""
    return {name: tuple(f"{prefix(layer)}{product}.weight" for product in group) for name, group in INPUTS.items()}


def embed(store: WeightStore, config: FalconH1Config, ids: Ids) -> Array:
    """The first layer's input, float32 [seq, hidden], reading the rows of ``ids`` [seq] only."""
    used, places = np.unique(ids, return_inverse=True)
    rows = np.concatenate([store.rows(EMBEDDING, token, token + 1) for token in used])
    result: Array = rows[places] * np.float32(config.embedding_multiplier)
    return result


def final_norm(store: WeightStore, config: FalconH1Config, hidden: Array) -> Tensor:
    """The head's input, float32 [seq, hidden]."""
    weight = torch.from_numpy(store.rows(FINAL_NORM, 0, config.hidden_size))
    return torch.nn.functional.rms_norm(torch.from_numpy(hidden), weight.shape, weight, config.rms_norm_eps)


def logits(store: WeightStore, config: FalconH1Config, hidden: Array, head: Array) -> Array:
    """[seq, vocab] of the last layer's output [seq, hidden]."""
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
        self._layer.load_state_dict({name: torch.from_numpy(read(prefix(layer) + name)) for name in names}, assign=True)
        self._layer.mamba.mup = mup_vector(config)
        tensors = StateSpec.of(config).tensors[:4]
        states = StateSpec(tensors).zeros(1)
        key, value, conv, recurrent = (torch.from_numpy(states[tensor.key]) for tensor in tensors)
        self._states: LayerStates = (key, value, conv, recurrent)
        self._thread = threading.local()
        for name in INPUTS:
            self._layer.get_submodule(name).register_forward_pre_hook(partial(self._see, name))

    def output(self, hidden: Array) -> Array:
        """Of ``hidden`` [seq, hidden]; on any thread."""
        return self.run(hidden)[0]

    def run(self, hidden: Array) -> tuple[Array, Mapping[str, Tensor]]:
        """The output, and the inputs of its products [seq, columns] by INPUTS' names; on any thread."""
        seq = len(hidden)
        seen = dict[str, Tensor]()
        self._thread.seen = seen
        ones = torch.ones(1, seq)
        with torch.no_grad():
            result, _ = self._layer(
                torch.from_numpy(hidden)[None], torch.arange(seq)[None], ones.long(), ones, self._states
            )
        output: Array = result[0].numpy()
        return output, seen

    def _see(self, name: str, _: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._thread.seen[name] = arguments[0][0]
