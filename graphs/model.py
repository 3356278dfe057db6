"""Falcon-H1 in one readable file, written so that torch.export sees one graph for prefill and decode.

Parameter names are the checkpoint's. States are explicit inputs and outputs. µP multipliers stand where the published
model has them; graph passes fold them into weights later. What the model family does is in docs/concepts.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.projections import IN_PROJ
from h1export.model.falcon_h1.states import StateKind
from h1export.plugins import h1

LayerStates = tuple[Tensor, Tensor, Tensor, Tensor]  # key, value, conv_state, recurrent_state: StateKind's order


def scaled(x: Tensor, multiplier: float) -> Tensor:
    """Returns x * multiplier; a multiplier of 1 makes no node in the graph."""
    return x if multiplier == 1.0 else x * multiplier


def mup_vector(config: FalconH1Config) -> Tensor:
    """Returns ssm_multipliers spread over the rows of in_proj's output [z | x | B | C | dt]."""
    return torch.cat([torch.full((rows,), factor) for rows, factor in IN_PROJ.output_multiplier(config)])


def layer_states(tensors: Sequence[Tensor]) -> list[LayerStates]:
    """Returns the states of all layers, given in the order of StateSpec, layer by layer."""
    stride = len(StateKind)
    return [(key, value, conv, rec) for key, value, conv, rec in zip(*[iter(tensors)] * stride, strict=True)]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """RMSNorm over each SSM group of channels, gated by silu(z) before or after the norm."""

    def __init__(self, config: FalconH1Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.mamba_d_ssm))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        config = self.config
        gate = F.silu(z)
        if not config.mamba_norm_before_gate:
            y = y * gate
        width = config.mamba_d_ssm // config.mamba_n_groups
        grouped = y.view(y.shape[0], y.shape[1], config.mamba_n_groups, width)
        y = F.rms_norm(grouped, (width,), None, config.rms_norm_eps).view(y.shape) * self.weight
        return y * gate if config.mamba_norm_before_gate else y


class Conv1d(nn.Module):
    """Holds the depthwise convolution's parameters under the checkpoint's names."""

    def __init__(self, config: FalconH1Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.conv_dim, 1, config.mamba_d_conv))
        self.bias = nn.Parameter(torch.empty(config.conv_dim)) if config.mamba_conv_bias else None


class Mixer(nn.Module):
    """The Mamba-2 mixer: in_proj, causal convolution, scan, gate, out_proj."""

    mup: Tensor

    def __init__(self, config: FalconH1Config) -> None:
        super().__init__()
        self.config = config
        self.in_proj = nn.Linear(config.hidden_size, sum(config.in_proj_parts), bias=config.mamba_proj_bias)
        self.conv1d = Conv1d(config)
        self.dt_bias = nn.Parameter(torch.empty(config.mamba_n_heads))
        self.A_log = nn.Parameter(torch.empty(config.mamba_n_heads))
        self.D = nn.Parameter(torch.empty(config.mamba_n_heads))
        self.norm = GatedRMSNorm(config) if config.mamba_rms_norm else None
        self.out_proj = nn.Linear(config.mamba_d_ssm, config.hidden_size, bias=config.projectors_bias)
        self.register_buffer("mup", mup_vector(config), persistent=False)

    def forward(self, x: Tensor, real: Tensor, conv: Tensor, recurrent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the mixed values [batch, seq, hidden] and the two new states; arguments are those of ``gated``."""
        gated, conv, recurrent = self.gated(x, real, conv, recurrent)
        return self.out_proj(gated), conv, recurrent

    def gated(self, x: Tensor, real: Tensor, conv: Tensor, recurrent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the input of out_proj [batch, seq, d_ssm] and the two new states.

        Args:
            x: float [batch, seq, hidden].
            real: float [batch, seq], 1.0 for tokens and 0.0 for pads.
            conv: the convolution state, as StateSpec describes it.
            recurrent: the SSM state, as StateSpec describes it.
        """
        config = self.config
        (batch, seq) = x.shape[:2]
        projected = self.in_proj(scaled(x, config.ssm_in_multiplier))
        if any(factor != 1.0 for factor in config.ssm_multipliers):
            projected = projected * self.mup
        z, xbc, dt = projected.split([config.mamba_d_ssm, config.conv_dim, config.mamba_n_heads], dim=-1)
        # masked after the projection, so that the convolution sees zeros for pads even with a projection bias
        xbc, conv = h1.causal_conv(xbc * real[..., None], conv, self.conv1d.weight, self.conv1d.bias)
        u, b, c = xbc.split([config.mamba_d_ssm, config.bc_dim, config.bc_dim], dim=-1)
        y, recurrent = h1.ssm_scan(
            u.view(batch, seq, config.mamba_n_heads, config.mamba_d_head),
            dt,
            -torch.exp(self.A_log),
            b.view(batch, seq, config.mamba_n_groups, config.mamba_d_state),
            c.view(batch, seq, config.mamba_n_groups, config.mamba_d_state),
            self.D,
            self.dt_bias,
            recurrent,
            real,
            config.mamba_chunk_size,
            *config.time_step_limit,
        )
        y = y.view(batch, seq, config.mamba_d_ssm)
        gated = self.norm(y, z) if self.norm is not None else y * F.silu(z)
        return gated, conv, recurrent


class Attention(nn.Module):
    """Grouped-query attention with µP-scaled keys."""

    def __init__(self, config: FalconH1Config) -> None:
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(config.hidden_size, config.attention_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(config.attention_dim, config.hidden_size, bias=config.attention_bias)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, past_k: Tensor, past_v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the attended values [batch, seq, hidden], and all keys and values."""
        attended, keys, values = self.attended(x, positions, mask, past_k, past_v)
        return self.o_proj(attended), keys, values

    def attended(
        self, x: Tensor, positions: Tensor, mask: Tensor, past_k: Tensor, past_v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the input of o_proj [batch, seq, attention_dim], and all keys and values."""
        config = self.config
        (batch, seq) = x.shape[:2]
        q = self.q_proj(x).view(batch, seq, config.num_attention_heads, config.head_dim)
        k = scaled(self.k_proj(x), config.key_multiplier).view(batch, seq, config.num_key_value_heads, config.head_dim)
        v = self.v_proj(x).view(batch, seq, config.num_key_value_heads, config.head_dim)
        out, keys, values = h1.attention(q, k, v, past_k, past_v, positions, mask, config.rope_theta)
        return out.view(batch, seq, config.attention_dim), keys, values


class MLP(nn.Module):
    """SwiGLU with µP on the gate and the output."""

    def __init__(self, config: FalconH1Config) -> None:
        super().__init__()
        self.config = config
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return scaled(self.down_proj(self.product(x)), self.config.mlp_multipliers[1])

    def product(self, x: Tensor) -> Tensor:
        """Returns the input of down_proj [batch, seq, intermediate]."""
        found: Tensor = self.up_proj(x) * F.silu(scaled(self.gate_proj(x), self.config.mlp_multipliers[0]))
        return found


class Layer(nn.Module):
    """Two mixers side by side on one normed input, one residual add; then the MLP."""

    def __init__(self, config: FalconH1Config) -> None:
        super().__init__()
        self.config = config
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mamba = Mixer(config)
        self.self_attn = Attention(config)
        self.pre_ff_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = MLP(config)

    def forward(
        self, h: Tensor, positions: Tensor, mask: Tensor, real: Tensor, states: LayerStates
    ) -> tuple[Tensor, LayerStates]:
        config = self.config
        (past_k, past_v, conv, recurrent) = states
        x = self.input_layernorm(h)
        mixed, conv, recurrent = self.mamba(x, real, conv, recurrent)
        attended, keys, values = self.self_attn(
            scaled(x, config.attention_in_multiplier), positions, mask, past_k, past_v
        )
        h = h + scaled(mixed, config.ssm_out_multiplier) + scaled(attended, config.attention_out_multiplier)
        h = h + self.feed_forward(self.pre_ff_layernorm(h))
        return h, (keys, values, conv, recurrent)


class Backbone(nn.Module):
    """Holds the parameters that the checkpoint names ``model.*``."""

    def __init__(self, config: FalconH1Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class FalconH1(nn.Module):
    """The whole model: it computes logits and new states for new tokens.

    Args:
        config: the architecture.
        last_only: logits of the last position only, [batch, 1, vocab], instead of all.
    """

    def __init__(self, config: FalconH1Config, last_only: bool = False) -> None:
        super().__init__()
        self.config = config
        self.last_only = last_only
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, states: list[LayerStates]
    ) -> tuple[Tensor, list[LayerStates]]:
        """Returns the logits, and the new states in the order of ``states``.

        Args:
            input_ids: int64 [batch, seq].
            attention_mask: int64 [batch, past + seq], 1 for tokens and 0 for pads; pads are on the left only.
            states: the states of each layer, as StateSpec describes them.
        """
        config = self.config
        seq = input_ids.shape[1]
        past = attention_mask.shape[1] - seq  # not the keys' own length: a target may hold them in a longer buffer
        # positions count real tokens; pads, all on the left, get position 0
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0).narrow(1, past, seq)
        h = scaled(self.model.embed_tokens(input_ids), config.embedding_multiplier)
        real = attention_mask.narrow(1, past, seq).to(h.dtype)
        new_states = []
        for layer, layer_states in zip(self.model.layers, states, strict=True):
            h, layer_states = layer(h, positions, attention_mask, real, layer_states)
            new_states.append(layer_states)
        if self.last_only:
            h = h.narrow(1, seq - 1, 1)
        return scaled(self.lm_head(self.model.final_layernorm(h)), config.lm_head_multiplier), new_states
