"""The op h1::ssm_scan: the Mamba-2 selective state-space scan (SSD) with a carried state.

Source: Dao and Gu, "Transformers are SSMs" (2024), sections 3 and 6; the chunked form is their algorithm 1.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    mask: Tensor,
    chunk_size: int,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    """Compute S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T and y_t = S_t C_t + D x_t for every token t.

    dt_t is clamp(softplus(dt_t + dt_bias), dt_min, dt_max) * mask_t; the sums are float32.

    Args:
        x: [batch, seq, heads, d_head].
        dt: [batch, seq, heads], before dt_bias, softplus and clamp.
        A: [heads], negative: the log decay per unit of dt.
        B: [batch, seq, groups, d_state]; head h reads group h // (heads / groups).
        C: [batch, seq, groups, d_state].
        D: [heads], the weight of the skip connection.
        dt_bias: [heads].
        state: float32 [batch, heads, d_head, d_state].
        mask: [batch, seq], 1 for real tokens; a padded position has dt = 0 and so leaves the state as it was.
        chunk_size: tokens per chunk; it affects speed and rounding only.
        dt_min: lower limit of dt after softplus.
        dt_max: upper limit of dt after softplus; may be infinite.

    Returns:
        y [batch, seq, heads, d_head] in x's dtype, and the float32 state after the last token; both are new tensors.
    """
    dt = F.softplus(dt.float() + dt_bias.float()).clamp(dt_min, dt_max) * mask.float()[..., None]
    decay = dt * A.float()
    drive = x.float() * dt[..., None]
    state = state.float()
    outputs = []
    for start in range(0, x.shape[1], chunk_size):
        chunk = slice(start, min(start + chunk_size, x.shape[1]))
        y, state = _chunk(drive[:, chunk], decay[:, chunk], B[:, chunk].float(), C=C[:, chunk].float(), state=state)
        outputs.append(y)
    y = torch.cat([drive[:, :0], *outputs], dim=1) + x.float() * D.float()[:, None]
    return y.to(x.dtype).contiguous(), state.clone(memory_format=torch.contiguous_format)


ssm_scan = torch.library.custom_op("h1::ssm_scan", mutates_args=())(reference)


@ssm_scan.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    mask: Tensor,
    chunk_size: int,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape, dtype=torch.float32)


def _chunk(u: Tensor, decay: Tensor, B: Tensor, *, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Compute y and the new state of one chunk (SSD, algorithm 1).

    u = dt x is [b, l, h, p], decay [b, l, h], B and C [b, l, g, n], state [b, h, p, n].
    """
    repeat = u.shape[2] // B.shape[2]
    B = B.repeat_interleave(repeat, dim=2)
    C = C.repeat_interleave(repeat, dim=2)
    # float64, because the result depends on differences of long cumulative sums
    total = decay.double().cumsum(1)
    between = (total[:, :, None] - total[:, None, :]).float()
    causal = torch.ones(u.shape[1], u.shape[1], dtype=torch.bool, device=u.device).tril()
    between = between.masked_fill(~causal[None, :, :, None], -math.inf).exp()
    y = torch.einsum("blhn,bshn,blsh,bshp->blhp", C, B, between, u)
    y = y + torch.einsum("blhn,bhpn,blh->blhp", C, state, total.exp().float())
    to_end = (total[:, -1:] - total).exp().float()
    state = state * total[:, -1].exp().float()[..., None, None] + torch.einsum("blh,blhp,blhn->bhpn", to_end, u, B)
    return y, state
