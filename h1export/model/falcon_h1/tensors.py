"""The checkpoint's tensors, by Hugging Face name, as the architecture demands them."""

from __future__ import annotations

from collections.abc import Mapping

from h1export.model.falcon_h1.config import FalconH1Config

TensorLayout = Mapping[str, tuple[int, ...]]

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
FINAL_NORM = "model.final_layernorm.weight"


def tensor_layout(config: FalconH1Config) -> TensorLayout:
    """Name -> shape of every tensor that a checkpoint of ``spec`` holds; a tied head has no tensor of its own."""
    h = config.hidden_size
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, h), FINAL_NORM: (h,)}
    if not config.tie_word_embeddings:
        tensors[LM_HEAD] = (config.vocab_size, h)
    for layer in range(config.num_hidden_layers):
        for name, shape in _layer(config).items():
            tensors[f"model.layers.{layer}.{name}"] = shape
    return tensors


def _layer(s: FalconH1Config) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (s.hidden_size,),
        "pre_ff_layernorm.weight": (s.hidden_size,),
    }

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        tensors[f"{name}.weight"] = (rows, columns)
        if bias:
            tensors[f"{name}.bias"] = (rows,)

    linear("mamba.in_proj", sum(s.in_proj_parts), s.hidden_size, s.mamba_proj_bias)
    linear("mamba.out_proj", s.hidden_size, s.mamba_d_ssm, s.projectors_bias)
    linear("self_attn.q_proj", s.attention_dim, s.hidden_size, s.attention_bias)
    linear("self_attn.k_proj", s.kv_dim, s.hidden_size, s.attention_bias)
    linear("self_attn.v_proj", s.kv_dim, s.hidden_size, s.attention_bias)
    linear("self_attn.o_proj", s.hidden_size, s.attention_dim, s.attention_bias)
    linear("feed_forward.gate_proj", s.intermediate_size, s.hidden_size, s.mlp_bias)
    linear("feed_forward.up_proj", s.intermediate_size, s.hidden_size, s.mlp_bias)
    linear("feed_forward.down_proj", s.hidden_size, s.intermediate_size, s.mlp_bias)
    tensors["mamba.conv1d.weight"] = (s.conv_dim, 1, s.mamba_d_conv)
    if s.mamba_conv_bias:
        tensors["mamba.conv1d.bias"] = (s.conv_dim,)
    for name in ("A_log", "D", "dt_bias"):
        tensors[f"mamba.{name}"] = (s.mamba_n_heads,)
    if s.mamba_rms_norm:
        tensors["mamba.norm.weight"] = (s.mamba_d_ssm,)
    return tensors
