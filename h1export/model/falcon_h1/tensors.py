"""The checkpoint's tensors, by Hugging Face name, as the architecture demands them."""

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
    """What the names of a layer's tensors begin with."""
    return f"{LAYERS}{layer}."


def split_layer(tensor: str) -> tuple[int | None, str]:
    """The layer of a checkpoint tensor and its name within the layer; (None, ``tensor``) for one outside the layers."""
    number, _, name = tensor.removeprefix(LAYERS).partition(".")
    if not tensor.startswith(LAYERS) or not number.isdecimal():
        return None, tensor
    return int(number), name


def projection_of(tensor: str) -> Projection | None:
    """The row of PROJECTIONS that a checkpoint tensor is the matrix of; None for biases, norms and all else."""
    layer, name = split_layer(tensor)
    return _BY_WEIGHT.get((layer is not None, name))


def tensor_shapes(config: FalconH1Config) -> TensorShapes:
    """Name -> shape of every tensor that a checkpoint of ``config`` holds; a tied head has no tensor of its own.

    The order is the order in which weight files hold them.
    """
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
