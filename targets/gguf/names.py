"""Tensors of a checkpoint by their names in GGUF, in one table, with the shapes that llama.cpp expects.

Source: gguf's MODEL_ARCH.FALCON_H1, and llama.cpp's src/models/falcon-h1.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.projections import FINAL_NORM, INPUT_NORM, MLP_NORM
from h1export.model.falcon_h1.tensors import EMBEDDING, LM_HEAD, layer_prefix, split_layer

Shape = tuple[int, ...]
ARCHITECTURE = "falcon-h1"


def _same(shape: Shape, _: FalconH1Config) -> Shape:
    return shape


def _column(shape: Shape, _: FalconH1Config) -> Shape:
    return (*shape, 1)


def _taps(shape: Shape, _: FalconH1Config) -> Shape:
    channels, _one, taps = shape
    return channels, taps


def _groups(shape: Shape, config: FalconH1Config) -> Shape:
    return config.mamba_n_groups, shape[0] // config.mamba_n_groups


@dataclass(frozen=True)
class Place:
    """Where a checkpoint tensor is in GGUF.

    Attributes:
        name: its name; relative to the layer where the tensor is.
        shape: (shape in the checkpoint, config) -> shape, slowest dimension first, of the same elements in order.
    """

    name: str
    shape: Callable[[Shape, FalconH1Config], Shape] = _same


CONV_BIAS = "mamba.conv1d.bias"
MODEL: Mapping[str, Place] = {
    EMBEDDING: Place("token_embd.weight"),
    FINAL_NORM: Place("output_norm.weight"),
    LM_HEAD: Place("output.weight"),
}
LAYER: Mapping[str, Place] = {
    f"{INPUT_NORM}.weight": Place("attn_norm.weight"),
    "mamba.in_proj.weight": Place("ssm_in.weight"),
    "mamba.conv1d.weight": Place("ssm_conv1d.weight", _taps),
    CONV_BIAS: Place("ssm_conv1d.bias"),
    "mamba.dt_bias": Place("ssm_dt.bias"),
    "mamba.A_log": Place("ssm_a", _column),  # -exp(A_log), as the passes have it
    "mamba.D": Place("ssm_d", _column),
    "mamba.norm.weight": Place("ssm_norm.weight", _groups),
    "mamba.out_proj.weight": Place("ssm_out.weight"),
    "self_attn.q_proj.weight": Place("attn_q.weight"),
    "self_attn.k_proj.weight": Place("attn_k.weight"),
    "self_attn.v_proj.weight": Place("attn_v.weight"),
    "self_attn.o_proj.weight": Place("attn_output.weight"),
    f"{MLP_NORM}.weight": Place("ffn_norm"),  # without a suffix, in this architecture alone
    "feed_forward.gate_proj.weight": Place("ffn_gate.weight"),
    "feed_forward.gate_proj.bias": Place("ffn_gate.bias"),
    "feed_forward.up_proj.weight": Place("ffn_up.weight"),
    "feed_forward.up_proj.bias": Place("ffn_up.bias"),
    "feed_forward.down_proj.weight": Place("ffn_down.weight"),
    "feed_forward.down_proj.bias": Place("ffn_down.bias"),
}


def place_of(tensor: str) -> Place:
    """Return the place of the checkpoint tensor ``tensor``, by its whole name.

    Raises:
        KeyError: GGUF has no place for it; refuse.py has refused the models that have one.
    """
    layer, name = split_layer(tensor)
    if layer is None:
        return MODEL[name]
    place = LAYER[name]
    return Place(f"blk.{layer}.{place.name}", place.shape)


def conv_bias(layer: int) -> str:
    """Return the name that the bias of a layer's convolution has in checkpoints that have one."""
    return layer_prefix(layer) + CONV_BIAS
