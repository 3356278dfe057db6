"""The GPU kernels of h1::ssm_scan in Triton: three for many tokens, parallel over chunks, and one for a single token.

Source: Dao and Gu, "Transformers are SSMs" (2024), section 6. A prompt is cut into chunks of Q tokens.

    chunk_state    one program per (tile of the state, chunk, head) computes what the chunk alone adds to the state
    state_passing  one program per (tile of the state, head) computes the state before each chunk, and the last state
    chunk_scan     one program per (tile of tokens and channels, chunk, head) computes y
    decode         one program per (channels, head) computes the state and y of a token in one pass over the state

Tensors are contiguous, with the shapes of op.py. x, dt, B, C, mask and y share one dtype; A, D, dt_bias, the states and
every sum are float32. Compiled when called, the kernels also take dt, mask, A, D and dt_bias in any other of these
dtypes, because they convert them to float32 themselves. T, H and G are never compiled in, so that a new length of a
prompt compiles nothing, and a call runs the code that is compiled ahead of time. Decays are summed tile by tile, from
the ends of each tile (Horner's scheme across tiles), so that no long sums are subtracted. The tensor cores take
operands in x's dtype. The operands of y are rounded to it once, because y itself is rounded to it. The state outlives
its call, so its terms are more precise: each is split into two operands, which leaves an error of the square of a
rounding, and is scaled by the largest step of its tile, because the steps of slow heads would be subnormal in fp16.
"""

import triton
import triton.language as tl


@triton.jit
def step_size(raw, bias, real, dt_min, dt_max):
    """Compute clamp(softplus(raw + bias), dt_min, dt_max) * real in float32.

    log1p is a series, because log(1 + e) loses the small steps of slow heads.
    """
    v = raw.to(tl.float32) + bias
    e = tl.exp(-tl.abs(v))
    z = e / (2.0 + e)  # log1p(e) = 2 atanh(z), z <= 1/3
    q = z * z
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))))
    softplus = tl.maximum(v, 0.0) + 2.0 * z * series
    return tl.minimum(tl.maximum(softplus, dt_min), dt_max) * real.to(tl.float32)


@triton.jit
def load_steps(dt, mask, bias, first, i, inside, h, H, dt_min, dt_max):
    """Compute the steps of head h for the tokens first + i; they are 0 outside.

    ``first`` is int64, so that the many offsets can be int32.
    """
    raw = tl.load(dt + first * H + h + i * H, mask=inside, other=0.0)
    real = tl.load(mask + first + i, mask=inside, other=0.0)
    return step_size(raw, bias, real, dt_min=dt_min, dt_max=dt_max)


@triton.jit
def scores(C, B, i, inside, keys_inside, stride, N: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr):
    """Compute C B^T, float32 [BT, BT], of BT tokens at the pointer C and BT tokens (keys) at the pointer B."""
    product = tl.zeros([BT, BT], tl.float32)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        c = tl.load(C + (i[:, None] * stride + n[None, :]), mask=inside[:, None], other=0.0)
        b = tl.load(B + (i[None, :] * stride + n[:, None]), mask=keys_inside[None, :], other=0.0)
        product = tl.dot(c, b, product, input_precision="ieee")
    return product


@triton.jit(do_not_specialize=["T", "H", "G"])
def chunk_state(
    x, dt, A, B, dt_bias, mask, T, H, G, dt_min, dt_max, local, total,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Compute local and total for each chunk.

    local [batch, H, chunks, P, N] is the state after a chunk that starts from a zero state; total [batch, H, chunks] is
    the log decay over the chunk.
    Grid: (P / BP * N / BN, chunks, batch * H).
    """
    tile = tl.program_id(0)
    chunk = tl.program_id(1)
    bh = tl.program_id(2)
    row = (bh // H).to(tl.int64) * T
    h = bh % H
    g = h // (H // G)
    i = tl.arange(0, BT)
    p = tile // (N // BN) * BP + tl.arange(0, BP)
    n = tile % (N // BN) * BN + tl.arange(0, BN)
    a = tl.load(A + h).to(tl.float32)
    bias = tl.load(dt_bias + h).to(tl.float32)
    state = tl.zeros([BP, BN], tl.float32)
    decay = 0.0
    unit = 1.0
    for start in range(chunk * Q, tl.minimum(chunk * Q + Q, T), BT):
        first = row + start
        inside = start + i < T
        step = load_steps(dt, mask, bias, first=first, i=i, inside=inside, h=h, H=H, dt_min=dt_min, dt_max=dt_max)
        steps = step * a
        whole = tl.sum(steps, axis=0)
        weight = step * tl.exp(tl.cumsum(steps, axis=0, reverse=True) - steps)
        most = tl.max(weight, axis=0)
        most = tl.where(most > 0.0, most, unit)
        u = tl.load(x + (first * H + h) * P + (i[None, :] * (H * P) + p[:, None]), mask=inside[None, :], other=0.0)
        b = tl.load(B + (first * G + g) * N + (i[:, None] * (G * N) + n[None, :]), mask=inside[:, None], other=0.0)
        drive = u.to(tl.float32) * (weight / most)[None, :]
        high = drive.to(x.dtype.element_ty)
        low = (drive - high.to(tl.float32)).to(x.dtype.element_ty)
        state = tl.dot(high, b, state * (tl.exp(whole) * unit / most), input_precision="ieee")
        state = tl.dot(low, b, state, input_precision="ieee")
        decay = decay + whole
        unit = most
    at = bh.to(tl.int64) * tl.num_programs(1) + chunk
    tl.store(local + at * (P * N) + (p[:, None] * N + n[None, :]), state * unit)
    tl.store(total + at, decay, mask=tile == 0)


@triton.jit(do_not_specialize=["chunks"])
def state_passing(local, total, state, chunks, entry, new_state, P: tl.constexpr, N: tl.constexpr, BS: tl.constexpr):
    """Compute entry and new_state; new_state may share the memory of state.

    entry [batch, H, chunks, P, N], in x's dtype, is the state before each chunk.
    Grid: (P * N / BS, batch * H).
    """
    bh = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BS + tl.arange(0, BS)
    s = tl.load(state + bh * P * N + at)
    for chunk in tl.range(0, chunks, num_stages=4):
        here = (bh * chunks + chunk) * P * N + at
        added = tl.load(local + here)
        decay = tl.exp(tl.load(total + bh * chunks + chunk))
        tl.store(entry + here, s.to(entry.dtype.element_ty))
        s = s * decay + added
    tl.debug_barrier()  # other threads may still read the memory of state
    tl.store(new_state + bh * P * N + at, s)


@triton.jit(do_not_specialize=["T", "H", "G"])
def chunk_scan(
    x, dt, A, B, C, D, dt_bias, mask, entry, T, H, G, dt_min, dt_max, y,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Compute y of BT tokens and BP channels of a head.

    y sums the contributions of the state before the chunk, of the earlier tiles of the chunk, and of the tile itself.
    Grid: (Q / BT * P / BP, chunks, batch * H).
    """
    tile = tl.program_id(0)
    chunk = tl.program_id(1)
    bh = tl.program_id(2)
    row = (bh // H).to(tl.int64) * T
    h = bh % H
    g = h // (H // G)
    own = chunk * Q + tile // (P // BP) * BT
    if own < T:
        p = tile % (P // BP) * BP + tl.arange(0, BP)
        i = tl.arange(0, BT)
        a = tl.load(A + h).to(tl.float32)
        bias = tl.load(dt_bias + h).to(tl.float32)
        first = row + own
        inside = own + i < T
        every = i < BT
        channels = i[:, None] * (H * P) + p[None, :]
        c_tile = C + (first * G + g) * N
        acc = tl.zeros([BT, BP], tl.float32)
        for start in range(0, N, BN):
            n = start + tl.arange(0, BN)
            c = tl.load(c_tile + (i[:, None] * (G * N) + n[None, :]), mask=inside[:, None], other=0.0)
            s = tl.load(
                entry + (bh.to(tl.int64) * tl.num_programs(1) + chunk) * (P * N) + (p[None, :] * N + n[:, None])
            )
            acc = tl.dot(c, s, acc, input_precision="ieee")
        for start in range(chunk * Q, own, BT):
            keys = row + start
            step = load_steps(dt, mask, bias, first=keys, i=i, inside=every, h=h, H=H, dt_min=dt_min, dt_max=dt_max)
            steps = step * a
            weight = step * tl.exp(tl.cumsum(steps, axis=0, reverse=True) - steps)
            w = (
                scores(
                    c_tile, B + (keys * G + g) * N, i, inside=inside, keys_inside=every, stride=G * N, N=N, BT=BT, BN=BN
                )
                * weight[None, :]
            )
            u = tl.load(x + (keys * H + h) * P + channels)
            acc = tl.dot(w.to(u.dtype), u, acc * tl.exp(tl.sum(steps, axis=0)), input_precision="ieee")
        step = load_steps(dt, mask, bias, first=first, i=i, inside=inside, h=h, H=H, dt_min=dt_min, dt_max=dt_max)
        since = tl.cumsum(step * a, axis=0)
        between = tl.exp(tl.minimum(since[:, None] - since[None, :], 0.0)) * step[None, :]
        w = scores(
            c_tile, B + (first * G + g) * N, i, inside=inside, keys_inside=inside, stride=G * N, N=N, BT=BT, BN=BN
        )
        w = tl.where(i[:, None] >= i[None, :], w * between, 0.0)
        u = tl.load(x + (first * H + h) * P + channels, mask=inside[:, None], other=0.0)
        acc = tl.dot(w.to(u.dtype), u, acc * tl.exp(since)[:, None], input_precision="ieee")
        acc += tl.load(D + h).to(tl.float32) * u.to(tl.float32)
        tl.store(y + (first * H + h) * P + channels, acc.to(y.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["H", "G"])
def decode(
    x, dt, A, B, C, D, dt_bias, state, mask, H, G, dt_min, dt_max, y, new_state,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Compute y and the state of one token; new_state may share the memory of state.

    Each element of the state is read once and written once.
    Grid: (P / BP, batch * H).
    """
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    n = tl.arange(0, N)
    at = p[:, None] * N + n[None, :]
    row = bh.to(tl.int64) * (P * N)
    s = tl.load(state + row + at)
    bias = tl.load(dt_bias + h).to(tl.float32)
    step = step_size(tl.load(dt + bh), bias, tl.load(mask + b), dt_min=dt_min, dt_max=dt_max)
    u = tl.load(x + bh * P + p).to(tl.float32)
    group = (b * G + h // (H // G)) * N + n
    a = tl.load(A + h).to(tl.float32)
    s = s * tl.exp(step * a) + (step * u)[:, None] * tl.load(B + group).to(tl.float32)[None, :]
    tl.debug_barrier()  # other threads may still read the memory of state
    tl.store(new_state + row + at, s)
    out = tl.sum(s * tl.load(C + group).to(tl.float32)[None, :], axis=1) + tl.load(D + h).to(tl.float32) * u
    tl.store(y + bh * P + p, out.to(y.dtype.element_ty))
