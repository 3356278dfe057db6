"""The tiny Falcon-H1 of tools/train_tiny.py: architecture, first weights, and a compact forward pass.

The forward pass is at effective scale: every µP multiplier is 1, and tools/train_tiny.py divides the weights by their
multipliers afterwards.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import FalconH1Config, FalconH1ForCausalLM


def config() -> FalconH1Config:
    """The tiny architecture: every hard feature of the family on, and no multiplier equal to 1."""
    return FalconH1Config(
        architectures=["FalconH1ForCausalLM"],
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        mamba_d_ssm=384,
        mamba_n_heads=6,
        mamba_d_head=64,
        mamba_n_groups=2,
        mamba_d_state=64,
        mamba_d_conv=4,
        mamba_chunk_size=64,
        mamba_conv_bias=True,
        mamba_rms_norm=True,
        mamba_norm_before_gate=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e11},
        embedding_multiplier=5.65685,
        lm_head_multiplier=0.125,
        attention_in_multiplier=1.4,
        attention_out_multiplier=0.625,
        key_multiplier=0.390625,
        ssm_in_multiplier=1.6,
        ssm_out_multiplier=0.235702,
        ssm_multipliers=[0.353553, 0.25, 0.441942, 0.5, 0.707107],
        mlp_multipliers=[0.6, 0.4],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        initializer_range=0.02,
    )


def in_proj_rows(cfg: FalconH1Config) -> list[int]:
    """Row counts of the z, x, B, C and dt parts of in_proj."""
    bc = cfg.mamba_n_groups * cfg.mamba_d_state
    return [cfg.mamba_d_ssm, cfg.mamba_d_ssm, bc, bc, cfg.mamba_n_heads]


def multipliers(cfg: FalconH1Config) -> dict[str, float | Tensor]:
    """What a weight at effective scale is divided by, by the last part of its module's name; absent means 1."""
    rows = torch.tensor(cfg.ssm_multipliers).repeat_interleave(torch.tensor(in_proj_rows(cfg)))
    attention_in = cfg.attention_in_multiplier
    (gate, down) = cfg.mlp_multipliers
    return {
        "embed_tokens": cfg.embedding_multiplier,
        "lm_head": cfg.lm_head_multiplier,
        "in_proj": rows[:, None] * cfg.ssm_in_multiplier,
        "out_proj": cfg.ssm_out_multiplier,
        "q_proj": attention_in,
        "k_proj": attention_in * cfg.key_multiplier,
        "v_proj": attention_in,
        "o_proj": cfg.attention_out_multiplier,
        "gate_proj": gate,
        "down_proj": down,
    }


def init_weights(cfg: FalconH1Config, seed: int) -> dict[str, Tensor]:
    """Effective-scale fp32 weights under their transformers names; outputs that join the residual start smaller."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in FalconH1ForCausalLM(cfg).named_parameters()}
    gen = torch.Generator().manual_seed(seed)
    scales = {
        "embed_tokens": 0.5,
        "lm_head": 0.01,
        "conv1d.weight": 0.5,
        "conv1d.bias": 0.0,
        "norm": 0.0,
        "mamba.D": 0.0,
    }
    out = {}
    for name, shape in shapes.items():
        w = torch.randn(shape, generator=gen)
        if name.endswith("dt_bias"):  # softplus(dt_bias) log-uniform in [1e-3, 1e-1]
            dt = torch.exp(math.log(1e-3) + math.log(100) * torch.rand(shape, generator=gen))
            w = dt + torch.log(-torch.expm1(-dt))
        elif name.endswith("A_log"):
            w = torch.log(1 + 15 * torch.rand(shape, generator=gen))
        elif kind := next((kind for kind in scales if kind in name), None):
            w = w * scales[kind] + (kind in ("norm", "mamba.D"))
        else:
            joins = name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight"))
            w = w * shape[1] ** -0.5 * ((2 * cfg.num_hidden_layers) ** -0.5 if joins else 1)
        out[name] = w.requires_grad_()
    return out


def ssd(x: Tensor, dt: Tensor, a: Tensor, *, b: Tensor, c: Tensor, chunk: int) -> Tensor:
    """Chunked SSD (arXiv:2405.21060) from a zero state.

    x [B, T, H, P], dt [B, T, H], a [H], b and c [B, T, G, N] give [B, T, H, P].
    """
    (bsz, t, h, p) = x.shape
    (g, n) = b.shape[2:]
    k = t // chunk
    r = h // g
    xdt = (x * dt[..., None]).view(bsz, k, chunk, g, r, p).permute(0, 1, 3, 4, 2, 5)
    b, c = (m.view(bsz, k, chunk, g, n).transpose(2, 3) for m in (b, c))
    acs = (dt * a).view(bsz, k, chunk, g, r).permute(0, 1, 3, 4, 2).cumsum(-1)  # [B, k, G, r, Q]
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    decay = torch.exp((acs[..., :, None] - acs[..., None, :]).masked_fill(~causal, -torch.inf))
    y = (decay * (c @ b.transpose(-1, -2))[:, :, :, None]) @ xdt
    states = (xdt * torch.exp(acs[..., -1:] - acs)[..., None]).transpose(-1, -2) @ b[
        :, :, :, None
    ]  # [B, k, G, r, P, N]
    total = torch.exp(acs[..., -1])[..., None, None]
    state = torch.zeros_like(states[:, 0])
    before = []
    for i in range(k):
        before.append(state)
        state = state * total[:, i] + states[:, i]
    y = y + (c[:, :, :, None] @ torch.stack(before, 1).transpose(-1, -2)) * torch.exp(acs)[..., None]
    return y.permute(0, 1, 4, 2, 3, 5).reshape(bsz, t, h, p)


def mamba(cfg: FalconH1Config, w: dict[str, Tensor], x: Tensor) -> Tensor:
    """One Mamba-2 mixer with grouped gated RMSNorm (gate first); x [B, T, hidden]."""
    d = cfg.mamba_d_ssm
    h = cfg.mamba_n_heads
    g = cfg.mamba_n_groups
    n = cfg.mamba_d_state
    bsz, t = x.shape[:2]
    z, xbc, dt = F.linear(x, w["mamba.in_proj.weight"]).split([d, d + 2 * g * n, h], -1)
    taps = w["mamba.conv1d.weight"][:, 0]
    padded = F.pad(xbc, (0, 0, cfg.mamba_d_conv - 1, 0))
    xbc = F.silu(w["mamba.conv1d.bias"] + sum(padded[:, i : i + t] * taps[:, i] for i in range(cfg.mamba_d_conv)))
    u, b, c = xbc.split([d, g * n, g * n], -1)
    u = u.reshape(bsz, t, h, d // h)
    b = b.reshape(bsz, t, g, n)
    c = c.reshape(bsz, t, g, n)
    y = (
        ssd(u, F.softplus(dt + w["mamba.dt_bias"]), -torch.exp(w["mamba.A_log"]), b=b, c=c, chunk=cfg.mamba_chunk_size)
        + u * w["mamba.D"][:, None]
    )
    y = (y.reshape(bsz, t, d) * F.silu(z)).view(bsz, t, g, d // g)
    y = F.rms_norm(y, (d // g,), eps=cfg.rms_norm_eps).view(bsz, t, d) * w["mamba.norm.weight"]
    return F.linear(y, w["mamba.out_proj.weight"])


def attention(cfg: FalconH1Config, w: dict[str, Tensor], x: Tensor, *, cos: Tensor, sin: Tensor) -> Tensor:
    """Causal grouped-query attention with rotary positions; x [B, T, hidden]."""
    bsz, t, _ = x.shape
    q, k, v = (
        F.linear(x, w[f"self_attn.{m}_proj.weight"]).view(bsz, t, -1, cfg.head_dim).transpose(1, 2) for m in "qkv"
    )
    q, k = (m * cos + torch.cat([-m[..., m.shape[-1] // 2 :], m[..., : m.shape[-1] // 2]], -1) * sin for m in (q, k))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return F.linear(y.transpose(1, 2).reshape(bsz, t, -1), w["self_attn.o_proj.weight"])


def forward(cfg: FalconH1Config, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits [B, T, vocab] of effective-scale weights for ids [B, T], T a multiple of the chunk size."""
    inv = cfg.rope_parameters["rope_theta"] ** (-torch.arange(0, cfg.head_dim, 2, device=ids.device) / cfg.head_dim)
    angle = torch.arange(ids.shape[1], device=ids.device)[:, None] * torch.cat([inv, inv])
    cos = angle.cos()
    sin = angle.sin()
    h = F.embedding(ids, weights["model.embed_tokens.weight"])
    for i in range(cfg.num_hidden_layers):
        prefix = f"model.layers.{i}."
        w = {name.removeprefix(prefix): p for name, p in weights.items() if name.startswith(prefix)}
        x = F.rms_norm(h, h.shape[-1:], w["input_layernorm.weight"], cfg.rms_norm_eps)
        h = h + mamba(cfg, w, x) + attention(cfg, w, x, cos=cos, sin=sin)
        y = F.rms_norm(h, h.shape[-1:], w["pre_ff_layernorm.weight"], cfg.rms_norm_eps)
        up = F.linear(y, w["feed_forward.up_proj.weight"])
        gate = F.linear(y, w["feed_forward.gate_proj.weight"])
        h = h + F.linear(up * F.silu(gate), w["feed_forward.down_proj.weight"])
    return F.linear(
        F.rms_norm(h, h.shape[-1:], weights["model.final_layernorm.weight"], cfg.rms_norm_eps),
        weights["lm_head.weight"],
    )
