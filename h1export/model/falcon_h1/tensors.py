"""The tensors that a checkpoint of an architecture must have, by their Hugging Face names."""

from __future__ import annotations

from collections.abc import Mapping

from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.projections import (
    EMBED_TOKENS,
    FINAL_NORM,
    HEAD,
    INPUT_NORM,
    LAYER_PROJECTIONS,
    MLP_NORM,
    PROJECTIONS,
    Projection,
)

TensorShapes = Mapping[str, tuple[int, ...]]

EMBEDDING = EMBED_TOKENS.weight
LM_HEAD = HEAD.weight
LAYERS = "model.layers."

_BY_WEIGHT = {(projection.per_layer, projection.weight): projection for projection in PROJECTIONS}


def layer_prefix(layer: int) -> str:
    """Returns the prefix of the names of a layer's tensors, such as "model.layers.0."."""
    return f"{LAYERS}{layer}."


def split_layer(tensor: str) -> tuple[int | None, str]:
    """Returns a tensor's layer and its name within the layer; (None, ``tensor``) for a tensor outside the layers."""
    number, _, name = tensor.removeprefix(LAYERS).partition(".")
    if not tensor.startswith(LAYERS) or not number.isdecimal():
        return None, tensor
    return int(number), name


def projection_of(tensor: str) -> Projection | None:
    """Returns the projection whose matrix is the checkpoint tensor; None for biases, norms and all other tensors."""
    layer, name = split_layer(tensor)
    return _BY_WEIGHT.get((layer is not None, name))


def tensor_shapes(config: FalconH1Config) -> TensorShapes:
    """Returns name -> shape of every tensor of a checkpoint of ``config``; a tied head has no tensor of its own."""
    h = config.hidden_size
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: EMBED_TOKENS.shape(config), FINAL_NORM: (h,)}
    if not config.tie_word_embeddings:
        tensors[LM_HEAD] = HEAD.shape(config)
    for layer in range(config.num_hidden_layers):
        for name, shape in _layer(config).items():
            tensors[layer_prefix(layer) + name] = shape
    return tensors


def _layer(config: FalconH1Config) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {f"{norm}.weight": (config.hidden_size,) for norm in (INPUT_NORM, MLP_NORM)}
    for projection in LAYER_PROJECTIONS:
        tensors[projection.weight] = projection.shape(config)
        if projection.has_bias(config):
            tensors[projection.bias] = (projection.rows(config),)
    tensors["mamba.conv1d.weight"] = (config.conv_dim, 1, config.mamba_d_conv)
    if config.mamba_conv_bias:
        tensors["mamba.conv1d.bias"] = (config.conv_dim,)
    for name in ("A_log", "D", "dt_bias"):
        tensors[f"mamba.{name}"] = (config.mamba_n_heads,)
    if config.mamba_rms_norm:
        tensors["mamba.norm.weight"] = (config.mamba_d_ssm,)
    return tensors
