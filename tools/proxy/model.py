"""The Falcon-H1 of tools/train_proxy.py: architecture, first weights, and a fast differentiable forward pass.

The forward pass is at effective scale: every µP multiplier except the two of the tied embedding is 1, and the weights
are divided by their multipliers when they are exported. Matrices are multiplied in ``dtype``; the residual stream, the
norms, the decays and the loss are float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import FalconH1Config, FalconH1ForCausalLM

BLOCK = 128  # queries that are multiplied at once
EMBEDDING_STD = 0.0625  # 1 / sqrt(hidden): logits start small, and no token is preferred


def config() -> FalconH1Config:
    """Return the proxy's architecture: the switches of the published small models, every width a multiple of 256."""
    return FalconH1Config(
        architectures=["FalconH1ForCausalLM"],
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        mamba_d_ssm=256,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_n_groups=1,
        mamba_d_state=64,
        mamba_d_conv=4,
        mamba_chunk_size=128,
        mamba_conv_bias=True,
        mamba_rms_norm=False,
        mamba_norm_before_gate=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e11},
        embedding_multiplier=5.65685,
        lm_head_multiplier=0.25,
        attention_in_multiplier=1.25,
        attention_out_multiplier=0.9375,
        key_multiplier=0.390625,
        ssm_in_multiplier=1.25,
        ssm_out_multiplier=0.235702,
        ssm_multipliers=[0.353553, 0.25, 0.353553, 0.5, 0.353553],
        mlp_multipliers=[0.883884, 0.585938],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        initializer_range=0.02,
    )


def init_weights(cfg: FalconH1Config, seed: int) -> dict[str, Tensor]:
    """Return float32 weights at effective scale under their transformers names, without the tied head.

    Matrices that join the residual stream start smaller by the root of the number of joins.
    """
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in FalconH1ForCausalLM(cfg).named_parameters()}
    gen = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in shapes.items():
        w = torch.randn(shape, generator=gen)
        if name.endswith("dt_bias"):  # softplus(dt_bias) is log-uniform in [1e-3, 1e-1], as in Mamba-2's release
            dt = torch.exp(math.log(1e-3) + math.log(100) * torch.rand(shape, generator=gen))
            w = dt + torch.log(-torch.expm1(-dt))
        elif name.endswith("A_log"):
            w = torch.log(1 + 15 * torch.rand(shape, generator=gen))
        elif "norm" in name or name.endswith("mamba.D"):
            w = torch.ones(shape)
        elif name.endswith("conv1d.bias"):
            w = torch.zeros(shape)
        elif "conv1d" in name:
            w = w * 0.5
        elif "embed_tokens" in name:
            w = w * EMBEDDING_STD
        else:
            joins = name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight"))
            w = w * shape[1] ** -0.5 * ((3 * cfg.num_hidden_layers) ** -0.5 if joins else 1)
        out[name] = w.requires_grad_()
    return out


def ssd(x: Tensor, dt: Tensor, a: Tensor, *, b: Tensor, c: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """Return the chunked SSD (arXiv:2405.21060) from a zero state, for one group.

    x [B, T, H, P], dt [B, T, H], a [H], b and c [B, T, N], T a multiple of ``chunk``, give [B, T, H, P] in ``dtype``.
    """
    (bsz, t, h, p) = x.shape
    n = b.shape[-1]
    k = t // chunk
    cum = (dt * a).view(bsz, k, chunk, h).permute(0, 1, 3, 2).cumsum(-1)  # [B, k, H, Q]
    xdt = (x * dt[..., None]).to(dtype).view(bsz, k, chunk, h, p).permute(0, 1, 3, 2, 4)  # [B, k, H, Q, P]
    b = b.to(dtype).view(bsz, k, chunk, n)
    c = c.to(dtype).view(bsz, k, chunk, n)
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    decay = torch.exp((cum[..., :, None] - cum[..., None, :]).masked_fill(~causal, -torch.inf))
    inside = (decay * (c @ b.transpose(-1, -2))[:, :, None]).to(dtype) @ xdt
    left = torch.exp(cum[..., -1:] - cum)[..., None].to(dtype)
    # what each chunk adds to the state, [B, k, N, H * P]: one product a chunk, because the group shares its B
    added = b.transpose(-1, -2) @ (xdt * left).transpose(2, 3).reshape(bsz, k, chunk, h * p)
    ends = F.pad(cum[..., -1], (0, 0, 1, 0)).cumsum(1)  # [B, k + 1, H], the log decay before each chunk
    between = (ends[:, :-1, None] - ends[:, None, 1:]).permute(0, 3, 1, 2)  # [B, H, to, from]
    earlier = torch.ones(k, k, dtype=torch.bool, device=x.device).tril(-1)
    weights = torch.exp(between.masked_fill(~earlier, -torch.inf))
    states = added.float().view(bsz, k, n, h, p).permute(0, 3, 1, 2, 4).reshape(bsz, h, k, n * p)
    before = (weights @ states).view(bsz, h, k, n, p).permute(0, 2, 3, 1, 4).reshape(bsz, k, n, h * p).to(dtype)
    carried = (c @ before).view(bsz, k, chunk, h, p) * torch.exp(cum).transpose(2, 3)[..., None].to(dtype)
    return (inside.transpose(2, 3) + carried).reshape(bsz, t, h, p)


def mamba(cfg: FalconH1Config, w: dict[str, Tensor], x: Tensor, *, chunk: int, dtype: torch.dtype) -> Tensor:
    """Return one Mamba-2 mixer without its norm; x [B, T, hidden] in ``dtype``."""
    (d, h, n) = (cfg.mamba_d_ssm, cfg.mamba_n_heads, cfg.mamba_d_state)
    (bsz, t) = x.shape[:2]
    z, xbc, dt = F.linear(x, w["mamba.in_proj.weight"].to(dtype)).split([d, d + 2 * n, h], -1)
    taps = w["mamba.conv1d.weight"][:, 0].T.to(dtype).contiguous()
    padded = F.pad(xbc, (0, 0, cfg.mamba_d_conv - 1, 0))
    conv = w["mamba.conv1d.bias"].to(dtype).expand(bsz, t, -1)
    for i in range(cfg.mamba_d_conv):
        conv = torch.addcmul(conv, padded[:, i : i + t], taps[i])
    xbc = F.silu(conv)
    u, b, c = xbc.split([d, n, n], -1)
    u = u.reshape(bsz, t, h, d // h)
    step = F.softplus(dt.float() + w["mamba.dt_bias"])
    y = ssd(u, step, -torch.exp(w["mamba.A_log"]), b=b, c=c, chunk=chunk, dtype=dtype)
    y = (y + u * w["mamba.D"][:, None].to(dtype)).reshape(bsz, t, d) * F.silu(z)
    return F.linear(y, w["mamba.out_proj.weight"].to(dtype))


def attention(
    cfg: FalconH1Config, w: dict[str, Tensor], x: Tensor, *, cos: Tensor, sin: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return causal grouped-query attention with rotary positions; x [B, T, hidden] in ``dtype``."""
    (bsz, t) = x.shape[:2]
    q, k, v = (
        F.linear(x, w[f"self_attn.{m}_proj.weight"].to(dtype)).view(bsz, t, -1, cfg.head_dim).transpose(1, 2)
        for m in "qkv"
    )
    half = cfg.head_dim // 2
    q, k = (m * cos + torch.cat([-m[..., half:], m[..., :half]], -1) * sin for m in (q * cfg.head_dim**-0.5, k))
    y = (
        in_blocks(q, k, v)
        if x.device.type == "cpu"
        else F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)
    )
    return F.linear(y.transpose(1, 2).reshape(bsz, t, -1), w["self_attn.o_proj.weight"].to(dtype))


def in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention of q [B, H, T, P], already scaled, on k and v [B, G, T, P].

    On a CPU it is faster than scaled_dot_product_attention by half, backward included.
    """
    (bsz, heads, t, width) = q.shape
    rows = heads // k.shape[1]  # heads that share keys become rows of one product
    after = torch.full((t, t), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    out = []
    for i in range(0, t, BLOCK):
        j = min(i + BLOCK, t)
        queries = q[:, :, i:j].reshape(bsz, -1, rows * (j - i), width)
        scores = queries @ k[:, :, :j].transpose(-1, -2)
        scores = scores.view(bsz, -1, rows, j - i, j) + after[i:j, :j]
        mixed = torch.softmax(scores, -1).view(bsz, -1, rows * (j - i), j) @ v[:, :, :j]
        out.append(mixed.view(bsz, heads, j - i, width))
    return torch.cat(out, 2)


def forward(cfg: FalconH1Config, weights: dict[str, Tensor], ids: Tensor, *, chunk: int, dtype: torch.dtype) -> Tensor:
    """Return float32 logits [B, T, vocab] for ids [B, T], T a multiple of ``chunk``."""
    inv = cfg.rope_parameters["rope_theta"] ** (-torch.arange(0, cfg.head_dim, 2, device=ids.device) / cfg.head_dim)
    angle = torch.arange(ids.shape[1], device=ids.device)[:, None] * torch.cat([inv, inv])
    cos = angle.cos().to(dtype)
    sin = angle.sin().to(dtype)
    table = weights["model.embed_tokens.weight"]
    h = F.embedding(ids, table) * cfg.embedding_multiplier
    for i in range(cfg.num_hidden_layers):
        prefix = f"model.layers.{i}."
        w = {name.removeprefix(prefix): p for name, p in weights.items() if name.startswith(prefix)}
        x = F.rms_norm(h, h.shape[-1:], w["input_layernorm.weight"], cfg.rms_norm_eps).to(dtype)
        h = h + mamba(cfg, w, x, chunk=chunk, dtype=dtype) + attention(cfg, w, x, cos=cos, sin=sin, dtype=dtype)
        y = F.rms_norm(h, h.shape[-1:], w["pre_ff_layernorm.weight"], cfg.rms_norm_eps).to(dtype)
        up = F.linear(y, w["feed_forward.up_proj.weight"].to(dtype))
        gate = F.linear(y, w["feed_forward.gate_proj.weight"].to(dtype))
        h = h + F.linear(up * F.silu(gate), w["feed_forward.down_proj.weight"].to(dtype))
    h = F.rms_norm(h, h.shape[-1:], weights["model.final_layernorm.weight"], cfg.rms_norm_eps).to(dtype)
    return F.linear(h, (table * cfg.lm_head_multiplier).to(dtype)).float()
