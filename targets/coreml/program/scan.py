"""h1::ssm_scan and h1::causal_conv in MIL.

The scan computes in float32, because its state adds up over thousands of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch.fx import Node

from h1export.graphs.program import args_of
from h1export.targets.coreml.program.context import ALL_REAL, Context
from h1export.targets.coreml.program.weights import Var
from h1export.targets.sizes import ScanSizes

# (context, sizes, step, decay, x, B, C, state), all values float32 -> y [1, T, heads, d_head], and the state after
Scan = Callable[..., tuple[Var, Var]]


def ssm_scan(c: Context, node: Node) -> None:
    """Emit the recurrence for one token, and one chunk of SSD for more (Dao and Gu 2024, section 6).

    The chunk sums log decays by masks, one sum for each pair of tokens: differences of cumulative sums would lose
    digits.
    """
    x, _dt, A, B, C, D, _dt_bias, state, *_ = args_of(node)
    sizes = ScanSizes.of(node)
    step = _step_sizes(c, node)
    decay = c.op("mul", x=step, y=_float32(c, A, (sizes.heads,)))  # [1, T, heads]
    operands = {name: c.float32(c.value(operand)) for name, operand in (("x", x), ("B", B), ("C", C))}
    scan: Scan = _chunk if c.call.padded else _one_token
    y, after = scan(c, sizes, step, decay=decay, **operands, state=c.states.read(c.state(state)))
    c.states.write(c.state(state), after)
    skip = c.op("mul", x=operands["x"], y=_float32(c, D, (sizes.heads, 1)))
    c.set(node, c.activation(c.op("add", x=y, y=skip)), after)


def _float32(c: Context, weight: Any, shape: tuple[int, ...]) -> Var:
    return c.weights.dense(c.expr(weight), shape, np.float32)


def _step_sizes(c: Context, scan: Node) -> Var:
    """Emit float32 [1, T, heads]: clamp(softplus(dt + dt_bias)), and 0 for pads."""
    _x, dt, _A, _B, _C, _D, dt_bias, _state, mask, _chunk, dt_min, dt_max = args_of(scan)
    heads = (ScanSizes.of(scan).heads,)
    step = c.op("softplus", x=c.op("add", x=c.float32(c.value(dt)), y=_float32(c, dt_bias, heads)))
    if dt_min > 0:
        step = c.op("maximum", x=step, y=np.float32(dt_min))
    if dt_max < math.inf:
        step = c.op("minimum", x=step, y=np.float32(dt_max))
    if (real := c.value(mask)) is ALL_REAL:
        return step
    return c.op("mul", x=step, y=c.once("real float32", lambda: c.op("expand_dims", x=c.float32(real), axes=[2])))


def _one_token(
    c: Context, sizes: ScanSizes, step: Var, *, decay: Var, x: Var, B: Var, C: Var, state: Var
) -> tuple[Var, Var]:
    """Emit S = exp(dt A) S + dt x B^T and y = S C.

    Heads of a group are neighbours, so a group is a matrix [heads of the group * d_head, d_state].
    """
    heads = (1, sizes.heads, 1, 1)
    grouped = (1, sizes.groups, -1, sizes.d_state)
    kept = c.op("mul", x=state, y=c.op("exp", x=c.op("reshape", x=decay, shape=heads)))
    columns = c.op("reshape", x=x, shape=(1, sizes.heads, sizes.d_head, 1))
    drive = c.op("mul", x=columns, y=c.op("reshape", x=step, shape=heads))
    rows = c.op("reshape", x=drive, shape=(1, sizes.groups, -1, 1))
    added = c.op("mul", x=rows, y=c.op("reshape", x=B, shape=(1, sizes.groups, 1, sizes.d_state)))
    after = c.op("add", x=c.op("reshape", x=kept, shape=grouped), y=added)
    y = c.op("matmul", x=after, y=c.op("reshape", x=C, shape=(1, sizes.groups, sizes.d_state, 1)))
    by_head = c.op("reshape", x=y, shape=(1, 1, sizes.heads, sizes.d_head))
    return by_head, c.op("reshape", x=after, shape=state.shape)


def _chunk(
    c: Context, sizes: ScanSizes, step: Var, *, decay: Var, x: Var, B: Var, C: Var, state: Var
) -> tuple[Var, Var]:
    """Emit one chunk of SSD: what its tokens add to each other, and what the state before them adds to each."""
    tokens = c.call.tokens
    heads = sizes.heads
    groups = sizes.groups
    B, C = (c.op("transpose", x=operand, perm=(0, 2, 1, 3)) for operand in (B, C))  # [1, groups, T, d_state]
    by_token = c.op("mul", x=x, y=c.op("expand_dims", x=step, axes=[3]))
    drive = c.op("transpose", x=by_token, perm=(0, 2, 1, 3))  # [1, heads, T, d_head]
    by_head = c.op("transpose", x=decay, perm=(0, 2, 1))
    between = _decay_between(c, by_head)
    scores = c.op("matmul", x=C, y=B, transpose_y=True)
    if groups > 1:  # a group's scores for each of its heads
        shaped = c.op("reshape", x=between, shape=(1, groups, sizes.group, tokens, tokens))
        weighed = c.op("mul", x=shaped, y=c.op("expand_dims", x=scores, axes=[2]))
        mixed = c.op("reshape", x=weighed, shape=(1, heads, tokens, tokens))
    else:
        mixed = c.op("mul", x=between, y=scores)
    within = c.op("transpose", x=c.op("matmul", x=mixed, y=drive), perm=(0, 2, 1, 3))  # [1, T, heads, d_head]
    rows = c.op("reshape", x=state, shape=(1, groups, -1, sizes.d_state))
    read = c.op("transpose", x=c.op("matmul", x=C, y=rows, transpose_y=True), perm=(0, 2, 1, 3))
    since_start = c.op("exp", x=c.op("cumsum", x=decay, axis=1))  # [1, T, heads]
    by_head_read = c.op("reshape", x=read, shape=(1, tokens, heads, sizes.d_head))
    carried = c.op("mul", x=by_head_read, y=c.op("expand_dims", x=since_start, axes=[3]))
    y = c.op("add", x=within, y=carried)
    return y, _state_after(c, sizes, by_head, between=between, drive=drive, B=B, state=state)


def _decay_between(c: Context, decay: Var) -> Var:
    """Emit [1, heads, T, T] of decay [1, heads, T]: exp(sum of decay over (s, t]) for s <= t, else 0."""
    lower = np.tril(np.ones((c.call.tokens, c.call.tokens), np.float32))
    strictly = c.op("mul", x=c.op("expand_dims", x=decay, axes=[3]), y=np.tril(lower, -1))
    return c.op("mul", x=c.op("exp", x=c.op("cumsum", x=strictly, axis=2)), y=lower)


def _state_after(c: Context, sizes: ScanSizes, decay: Var, *, between: Var, drive: Var, B: Var, state: Var) -> Var:
    """Emit the state after the chunk: the one before it, decayed, and what each token adds."""
    tokens = c.call.tokens
    heads = sizes.heads
    last_row = c.op("slice_by_size", x=between, begin=(0, 0, tokens - 1, 0), size=(1, heads, 1, tokens))
    to_end = c.op("reshape", x=last_row, shape=(1, heads, tokens, 1))
    ending = c.op("transpose", x=c.op("mul", x=drive, y=to_end), perm=(0, 1, 3, 2))  # [1, heads, d_head, T]
    rows = c.op("reshape", x=ending, shape=(1, sizes.groups, sizes.group * sizes.d_head, tokens))
    added = c.op("matmul", x=rows, y=B)
    total = c.op("reduce_sum", x=decay, axes=[2], keep_dims=True)
    kept = c.op("mul", x=state, y=c.op("expand_dims", x=c.op("exp", x=total), axes=[3]))
    return c.op("add", x=kept, y=c.op("reshape", x=added, shape=state.shape))


def causal_conv(c: Context, node: Node) -> None:
    """Emit a product and a sum for each tap, channels last; the state is what precedes the first pad.

    In float32 until the scan has read the result: there, what x, B and C are off by adds up.
    """
    x, state, weight, bias = args_of(node)
    inputs = c.op("concat", values=[c.states.read(c.state(state)), c.value(x)], axis=1)
    _, rows, channels = inputs.shape
    carried = rows - c.call.tokens
    wide = c.float32(inputs)
    total = None if bias is None else c.float32(c.value(bias))
    for tap in range(carried + 1):
        window = c.op("slice_by_size", x=wide, begin=(0, tap, 0), size=(1, c.call.tokens, channels))
        product = c.op("mul", x=window, y=c.float32(c.weights.conv_tap(c.expr(weight), tap)))
        total = product if total is None else c.op("add", x=product, y=total)
    begin = (0, c.call.tokens, 0) if c.n_valid is None else c.once("n_valid row", lambda: _row(c, c.n_valid))
    after = c.op("slice_by_size", x=inputs, begin=begin, size=(1, carried, channels))
    c.states.write(c.state(state), after)
    c.set(node, c.op("silu", x=total), after)


def _row(c: Context, index: Var) -> Var:
    """Emit [0, index, 0]."""
    zero = np.zeros(1, np.int32)
    return c.op("concat", values=[zero, index, zero], axis=0)
