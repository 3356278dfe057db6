"""What h1::ssm_scan runs on a CUDA device: the GPU kernels where they fit the call, or else the reference of op.py.

The kernels take contiguous tensors, which are made where a call brings others. `refusal` says when the reference runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from h1export.plugins.gpu import device
from h1export.plugins.gpu.kernel import DTYPES
from h1export.plugins.ssm_scan import launch
from h1export.plugins.ssm_scan.op import reference
from h1export.plugins.ssm_scan.tiles import TILES, tiles_for


def ssm_scan(
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
    """Compute the op with the GPU kernels, whose chunk is that of tiles.py, or with the reference.

    Where x, B and C differ in dtype, the kernels compute in float32. The call waits for no result of the device, so
    that a CUDA graph can hold it once Triton has compiled the kernels, which an equal call before the capture does.
    """
    if refusal(x, dt, A, B, C, D, dt_bias, state, mask) is not None:
        return reference(x, dt, A, B, C, D, dt_bias, state, mask, chunk_size, dt_min, dt_max)
    operands = x.dtype if x.dtype == B.dtype == C.dtype else torch.float32
    dt, A, D, dt_bias, mask = (
        tensor if tensor.dtype in DTYPES else tensor.float() for tensor in (dt, A, D, dt_bias, mask)
    )
    y, new_state = launch.ssm_scan(
        x.to(operands).contiguous(),
        dt.contiguous(),
        A.contiguous(),
        B.to(operands).contiguous(),
        C.to(operands).contiguous(),
        D.contiguous(),
        dt_bias.contiguous(),
        state.float().contiguous(),
        mask.contiguous(),
        dt_min,
        dt_max,
    )
    return y.to(x.dtype), new_state


def refusal(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    mask: Tensor,
) -> str | None:
    """Return why the kernels cannot take a call, such as sizes without a row in tiles.py; None if they can.

    The kernels read memory by the shapes of op.py, so that tensors of other shapes, which broadcast or are an error,
    are left to the reference.
    """
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}"
    if x.ndim != 4 or B.ndim != 4:
        return f"x and B have {x.ndim} and {B.ndim} dimensions, and not 4"
    (batch, tokens, heads, d_head) = x.shape
    (groups, d_state) = B.shape[2:]
    shapes = {
        "x": (batch, tokens, heads, d_head),
        "dt": (batch, tokens, heads),
        "A": (heads,),
        "B": (batch, tokens, groups, d_state),
        "C": (batch, tokens, groups, d_state),
        "D": (heads,),
        "dt_bias": (heads,),
        "state": (batch, heads, d_head, d_state),
        "mask": (batch, tokens),
    }
    tensors = {
        "x": x,
        "dt": dt,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "dt_bias": dt_bias,
        "state": state,
        "mask": mask,
    }
    if wrong := device.wrong_tensor(tensors, shapes, x.device):
        return wrong
    if x.numel() == 0 or groups == 0 or heads % groups != 0:
        return f"x has the shape {tuple(x.shape)}, and there are {groups} groups"
    if (d_head, d_state) not in TILES:
        return f"tiles.py has no row for head dim {d_head} and state size {d_state}"
    chunk = tiles_for(d_head, d_state, device.name(x.device)).chunk
    if max(batch * heads, -(-tokens // chunk)) > device.GRID_LIMIT:
        return f"batch {batch}, {heads} heads and {tokens} tokens exceed a grid"
    return device.refusal(x.device)
