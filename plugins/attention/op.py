"""The op h1::attention: grouped-query causal attention over a growing cache; it applies the rotary embedding itself.

Source: RoFormer (Su et al. 2021) in the half-split layout of transformers' ``FalconH1Attention``; grouped-query
attention (Ainslie et al. 2023).
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def composed(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, positions: Tensor, mask: Tensor, rope_theta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute softmax(rope(q) K^T / sqrt(dim) over visible columns) V with torch's own operators.

    K is past_k followed by rope(k), and V is past_v followed by v. All tensors but positions and mask share one dtype.

    Args:
        q: [batch, seq, heads, dim], before rotation.
        k: [batch, seq, kv_heads, dim], before rotation; query head h reads kv head h // (heads / kv_heads).
        v: [batch, seq, kv_heads, dim].
        past_k: [batch, kv_heads, past, dim], after rotation.
        past_v: [batch, kv_heads, past, dim].
        positions: int64 [batch, seq], the rotary position of each new token.
        mask: int64 [batch, past + seq], 1 for real tokens. A token always sees itself, so that padded rows stay finite.
        rope_theta: the base of the rotary frequencies.

    Returns:
        out [batch, seq, heads, dim], and K and V [batch, kv_heads, past + seq, dim]; all three are new tensors.
    """
    frequencies = rope_frequencies(rope_theta, q.shape[3]).to(q.device)
    return _attend(q, k, v, past_k, past_v, positions, mask, frequencies)


def on_cuda(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, positions: Tensor, mask: Tensor, rope_theta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `composed` does, without a wait of the host for the device; so a CUDA graph can hold the call.

    The frequencies stay those that the CPU computes. A captured graph copies them again at every replay, from memory
    that is never freed.
    """
    frequencies = _pinned_frequencies(rope_theta, q.shape[3]).to(q.device, non_blocking=True)
    return _attend(q, k, v, past_k, past_v, positions, mask, frequencies)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    positions: Tensor,
    mask: Tensor,
    frequencies: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    angles = positions[..., None].float() * frequencies
    keys = torch.cat([past_k, _rotate(k, angles).transpose(1, 2)], dim=2)
    values = torch.cat([past_v, v.transpose(1, 2)], dim=2)
    column = torch.arange(keys.shape[2], device=q.device)
    own = column[past_k.shape[2] :, None]
    visible = ((column[None] <= own) & mask[:, None, :].bool()) | (column[None] == own)
    query = _rotate(q, angles).transpose(1, 2)
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible[:, None], enable_gqa=True)
    return out.transpose(1, 2).contiguous(), keys.contiguous(), values.contiguous()


attention = torch.library.custom_op("h1::attention", mutates_args=())(composed)
attention.register_kernel("cuda")(on_cuda)


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, positions: Tensor, mask: Tensor, rope_theta: float
) -> tuple[Tensor, Tensor, Tensor]:
    grown = (past_k.shape[0], past_k.shape[1], past_k.shape[2] + k.shape[1], past_k.shape[3])
    return q.new_empty(q.shape), k.new_empty(grown), v.new_empty(grown)


def rope_frequencies(theta: float, dim: int) -> Tensor:
    """Return the radians per position, float32 [dim / 2].

    The expression is transformers' own, because an error in the last bit is 3e-3 rad at position 1e5.
    """
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))


@cache
def _pinned_frequencies(theta: float, dim: int) -> Tensor:
    """Return rope_frequencies in memory that a GPU may read while the host goes on."""
    return rope_frequencies(theta, dim).pin_memory()


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (i, i + dim / 2) of x [batch, seq, heads, dim] by angles [batch, seq, dim / 2]."""
    cos = angles.cos()[:, :, None].to(x.dtype)
    sin = angles.sin()[:, :, None].to(x.dtype)
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
