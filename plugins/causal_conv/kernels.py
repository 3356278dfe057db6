"""The GPU kernel of h1::causal_conv in Triton; with BT = 1 it serves a single token.

All tensors share one dtype and are contiguous, with the shapes of op.py; sums and SiLU are computed in float32.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def causal_conv(
    x, state, weight, bias, T, channels, y, new_state,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute y of BT tokens and BC channels; the programs of the first tokens also write new_state.

    new_state may share the memory of state, because the same programs read one and write the other.
    Grid: (channels / BC rounded up, T / BT rounded up, batch).
    """
    first = tl.program_id(1) * BT
    b = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    t = first + tl.arange(0, BT)
    known = c < channels
    row = x + b * T * channels
    past = state + (b * channels + c) * (TAPS - 1)
    acc = tl.zeros([BT, BC], tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + c, mask=known, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(TAPS):
        source = t + (tap - TAPS + 1)
        w = tl.load(weight + c * TAPS + tap, mask=known, other=0.0).to(tl.float32)
        inside = (source >= 0) & (source < T)
        taken = tl.load(
            row + source.to(tl.int64)[:, None] * channels + c[None, :], mask=inside[:, None] & known[None, :], other=0.0
        )
        acc += taken.to(tl.float32) * w[None, :]
        if first == 0:  # taps that reach before the first token read the state
            before = tl.load(
                past[None, :] + (source + TAPS - 1)[:, None], mask=(source < 0)[:, None] & known[None, :], other=0.0
            )
            acc += before.to(tl.float32) * w[None, :]
    silu = acc / (1.0 + tl.exp(-acc))
    out = y + b * T * channels + t.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(out, silu.to(y.dtype.element_ty), mask=(t < T)[:, None] & known[None, :])
    if first == 0:
        kept = tl.arange(0, triton.next_power_of_2(TAPS - 1))
        origin = T + kept - TAPS + 1
        slot = (kept < TAPS - 1)[:, None] & known[None, :]
        old = tl.load(past[None, :] + (origin + TAPS - 1)[:, None], mask=slot & (origin < 0)[:, None], other=0.0)
        new = tl.load(
            row + origin.to(tl.int64)[:, None] * channels + c[None, :], mask=slot & (origin >= 0)[:, None], other=0.0
        )
        tl.debug_barrier()  # other threads may still read the memory of state
        slots = new_state + (b * channels + c)[None, :] * (TAPS - 1) + kept[:, None]
        tl.store(slots, old + new, mask=slot)
