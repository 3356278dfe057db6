"""h1::attention in MIL: rotary tables, keys and values in buffers of fixed length, and the built-in attention op."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.fx import Node

from h1export.graphs.program import args_of
from h1export.plugins.attention.op import rope_frequencies
from h1export.targets.coreml.program.context import MASKED, Context
from h1export.targets.coreml.program.weights import Var
from h1export.targets.sizes import AttentionSizes


def attention(c: Context, node: Node) -> None:
    """Emit attention over queries [1, kv_heads, group * T, dim], so that no head of keys is repeated for its group."""
    q, k, v, past_k, past_v, *_, theta = args_of(node)
    sizes = AttentionSizes.of(node)
    tokens = c.call.tokens
    cos, sin = c.once(("rope", theta), lambda: _rotary_rows(c, theta, sizes.head_dim))
    query, new_keys = (_rotate(c, _heads_first(c, operand), cos, sin=sin) for operand in (q, k))
    keys = _append(c, past_k, new_keys, sizes=sizes)
    values = _append(c, past_v, _heads_first(c, v), sizes=sizes)
    grouped = c.op("reshape", x=query, shape=(1, sizes.kv_heads, sizes.group * tokens, sizes.head_dim))
    mask = c.once(("mask", sizes.group), lambda: _mask(c, sizes.group))
    out = c.op("scaled_dot_product_attention", query=grouped, key=keys, value=values, attn_mask=mask)
    by_head = c.op("reshape", x=out, shape=(1, sizes.heads, tokens, sizes.head_dim))
    c.set(node, c.op("transpose", x=by_head, perm=(0, 2, 1, 3)), keys, values)


def _heads_first(c: Context, x: Any) -> Var:
    return c.op("transpose", x=c.value(x), perm=(0, 2, 1, 3))


def rotary_table(theta: float, dim: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin, float64 [length, dim / 2], of transformers' float32 angles."""
    angles = torch.arange(length).float()[:, None] * rope_frequencies(theta, dim)
    return angles.double().cos(), angles.double().sin()


def _rotary_rows(c: Context, theta: Any, dim: int) -> tuple[Var, Var]:
    """Emit cos and sin of this call's positions, [T, dim / 2]."""
    tables = rotary_table(theta, dim, c.max_context)
    arrays = [table.numpy().astype(c.weights.compute) for table in tables]
    cos, sin = (c.op("gather", x=array, indices=positions(c), axis=0, validate_indices=False) for array in arrays)
    return cos, sin


def positions(c: Context) -> Var:
    """Emit the position of each token of the call, int32 [T]."""
    return c.once("positions", lambda: c.op("add", x=c.position, y=np.arange(c.call.tokens, dtype=np.int32)))


def _rotate(c: Context, x: Var, cos: Var, *, sin: Var) -> Var:
    """Emit the rotation of pairs (i, i + dim / 2)."""
    low, high = c.op("split", x=x, num_splits=2, axis=-1)
    first = c.op("sub", x=c.op("mul", x=low, y=cos), y=c.op("mul", x=high, y=sin))
    second = c.op("add", x=c.op("mul", x=high, y=cos), y=c.op("mul", x=low, y=sin))
    return c.op("concat", values=[first, second], axis=-1)


def _append(c: Context, past: Any, new: Var, *, sizes: AttentionSizes) -> Var:
    """Emit keys or values with this call's written at ``position``: [1, kv_heads, max_context, dim]."""
    begin, end = c.once("window", lambda: _window(c, sizes))
    return c.states.write(
        c.state(past), c.op("slice_update", x=c.states.read(c.state(past)), update=new, begin=begin, end=end)
    )


def _window(c: Context, sizes: AttentionSizes) -> tuple[Var, Var]:
    """Emit the first and last corner of this call's rows in the keys' buffer."""
    zero = np.zeros(1, np.int32)
    stop = c.op("add", x=c.position, y=np.int32(c.call.tokens))
    heads, dim = (np.array([size], np.int32) for size in (sizes.kv_heads, sizes.head_dim))
    begin = c.op("concat", values=[zero, zero, c.position, zero], axis=0)
    return begin, c.op("concat", values=[np.ones(1, np.int32), heads, stop, dim], axis=0)


def _mask(c: Context, group: int) -> Var:
    """Emit [1, 1, group * T, max_context]: 0 where a key is no later than the query.

    Pads are later than all real tokens.
    """
    columns = np.arange(c.max_context, dtype=np.int32)[None]
    later = c.op("greater", x=columns, y=c.op("expand_dims", x=positions(c), axes=[1]))
    masked = c.op("fill", shape=later.shape, value=c.weights.compute(MASKED))  # select does not broadcast its condition
    hidden = c.op("select", cond=later, a=masked, b=c.weights.compute(0))
    mask = c.op("expand_dims", x=hidden, axes=[0, 1])
    return mask if c.call.tokens == 1 else c.op("tile", x=mask, reps=(1, 1, group, 1))
