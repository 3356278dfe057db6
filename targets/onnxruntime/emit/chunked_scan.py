"""The Mamba-2 scan in ai.onnx operators: chunked SSD, parallel over chunks, without control flow.

Source: Dao and Gu, "Transformers are SSMs" (2024), section 6. Log decays between two tokens are sums over the tokens in
between, never differences of cumulative sums, which cancel in float32. Axes: b batch, c chunk, g group, r head of the
group, l and m token of the chunk, n d_state, p d_head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from h1export.targets.onnx.builder import GraphBuilder, Value
from h1export.targets.sizes import ScanSizes

# tokens of a chunk: the fastest of 32, 64 and 128 for prefill; a shorter call is one chunk of its own length
LENGTH = 64
END = np.iinfo(np.int64).max
FLOAT = 1


@dataclass(frozen=True)
class Chunks:
    """How a call's tokens are cut into chunks; the same for all layers.

    Attributes:
        seq: tokens of the call, int64 [1].
        length: tokens of a chunk, int64 [1].
        pads: zeros behind the last token of [b, seq, width], as Pad takes them.
        within: masks over the tokens of a chunk, as of ``_triangles``.
        across: masks over the initial state and the chunks.
    """

    seq: Value
    length: Value
    pads: Value
    within: tuple[Value, Value]
    across: tuple[Value, Value]

    @classmethod
    def of(cls, b: GraphBuilder, seq: Value) -> Chunks:
        """Cut ``seq`` tokens; the last chunk is filled up with zeros, which a zero dt makes exact."""
        length = b.op("Min", seq, b.ints(LENGTH))
        count = b.op("Div", b.op("Sub", b.op("Add", seq, length), b.ints(1)), length)
        missing = b.op("Sub", b.op("Mul", count, length), seq)
        pads = b.op("Concat", b.ints(0, 0, 0, 0), missing, b.ints(0), axis=0)
        return cls(seq, length, pads, within=_triangles(b, length), across=_triangles(b, b.op("Add", count, b.ints(1))))


def _triangles(b: GraphBuilder, size: Value) -> tuple[Value, Value]:
    """Return two float masks [size, size]: 1 where row > column, and 1 where row >= column."""
    index = b.op("Range", b.constant(0, np.int64), b.op("Squeeze", size), b.constant(1, np.int64))
    row = b.op("Unsqueeze", index, b.ints(1))
    column = b.op("Unsqueeze", index, b.ints(0))
    below = b.op("Cast", b.op("Greater", row, column), to=FLOAT)
    return below, b.op("Cast", b.op("GreaterOrEqual", row, column), to=FLOAT)


def _decay_between(b: GraphBuilder, log_decay: Value, triangles: tuple[Value, Value]) -> Value:
    """Return [.., i, j] of log_decay [.., i]: exp(sum of log_decay over (j, i]) where j <= i, else 0."""
    below, lower = triangles
    sums = b.op("CumSum", b.op("Mul", b.op("Unsqueeze", log_decay, b.ints(-1)), below), b.constant(-2, np.int64))
    return b.op("Mul", b.op("Exp", sums), lower)


def chunked_scan(
    b: GraphBuilder,
    sizes: ScanSizes,
    chunks: Chunks,
    *,
    drive: Value,
    log_decay: Value,
    B: Value,
    C: Value,
    state: Value,
) -> tuple[Value, Value]:
    """Emit S_t = exp(log_decay_t) S_{t-1} + B_t drive_t^T and y_t = C_t S_t.

    Args:
        b: the graph that the nodes go to.
        sizes: heads, groups, d_head and d_state of the scan.
        chunks: how the call's tokens are cut.
        drive: dt x, [b, seq, heads * p].
        log_decay: dt A, [b, seq, heads].
        B: [b, seq, g * n].
        C: like B.
        state: [b, heads, n, p].

    Returns:
        y [b, seq, heads, p] and the state after the last token.
    """
    g, n, p, r = sizes.groups, sizes.d_state, sizes.d_head, sizes.group

    def cut(x: Value, *tail: int, perm: list[int]) -> Value:
        shape = b.once(("chunk", tail), lambda: b.op("Concat", b.ints(0, -1), chunks.length, b.ints(*tail), axis=0))
        return b.op("Transpose", b.op("Reshape", b.op("Pad", x, chunks.pads), shape), perm=perm)

    u = cut(drive, g, r, p, perm=[0, 3, 4, 1, 2, 5])  # b g r c l p
    log = cut(log_decay, g, r, perm=[0, 3, 4, 1, 2])  # b g r c l
    keys = b.op("Unsqueeze", cut(B, g, n, perm=[0, 3, 1, 4, 2]), b.ints(2))  # b g 1 c n l
    queries = b.op("Unsqueeze", cut(C, g, n, perm=[0, 3, 1, 2, 4]), b.ints(2))  # b g 1 c l n

    within = _decay_between(b, log, chunks.within)  # b g r c l m
    scores = b.op("Mul", b.op("MatMul", queries, keys), within)
    to_end = b.op(
        "Transpose", b.op("Slice", within, b.ints(-1), b.ints(END), b.ints(4)), perm=[0, 1, 2, 3, 5, 4]
    )  # b g r c l 1
    added = b.op("MatMul", keys, b.op("Mul", u, to_end))  # b g r c n p
    from_start = b.op("CumSum", log, b.constant(-1, np.int64))  # b g r c l

    entering, last = _across(b, sizes, chunks, added=added, from_start=from_start, state=state)
    carried = b.op("Mul", b.op("MatMul", queries, entering), b.op("Unsqueeze", b.op("Exp", from_start), b.ints(5)))
    y = b.op("Transpose", b.op("Add", b.op("MatMul", scores, u), carried), perm=[0, 3, 4, 1, 2, 5])  # b c l g r p
    flat = b.op("Reshape", y, b.ints(0, -1, sizes.heads, p))
    return b.op("Slice", flat, b.ints(0), chunks.seq, b.ints(1)), last


def _across(
    b: GraphBuilder, sizes: ScanSizes, chunks: Chunks, *, added: Value, from_start: Value, state: Value
) -> tuple[Value, Value]:
    """Return the states before each chunk, [b, g, r, c, n, p], and after the last one, [b, heads, n, p].

    ``added``: what each chunk adds to the state; ``from_start``: log decays from its start to each of its tokens. One
    product with the decays between chunks takes the place of a loop over them.
    """
    g, n, p, r = sizes.groups, sizes.d_state, sizes.d_head, sizes.group
    first = b.op("Reshape", state, b.ints(0, g, r, 1, n * p))
    states = b.op("Concat", first, b.op("Reshape", added, b.ints(0, g, r, -1, n * p)), axis=3)
    whole = b.op("Squeeze", b.op("Slice", from_start, b.ints(-1), b.ints(END), b.ints(4)), b.ints(4))  # b g r c
    decay = _decay_between(b, b.op("Pad", whole, b.ints(0, 0, 0, 1, 0, 0, 0, 0)), chunks.across)
    after = b.op("MatMul", decay, states)  # b g r 1+c np
    before = b.op("Slice", after, b.ints(0), b.ints(-1), b.ints(3))
    last = b.op("Slice", after, b.ints(-1), b.ints(END), b.ints(3))
    entering = b.op("Reshape", before, b.ints(0, g, r, -1, n, p))
    return entering, b.op("Reshape", last, b.ints(0, sizes.heads, n, p))
