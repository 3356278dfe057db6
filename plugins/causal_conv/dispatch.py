"""What h1::causal_conv runs on a CUDA device: the GPU kernel where it fits the call, or else the reference of op.py.

The kernel takes contiguous tensors, which are made where a call brings others. `refusal` says when the reference runs.
"""

from __future__ import annotations

from torch import Tensor

from h1export.plugins.causal_conv import launch
from h1export.plugins.causal_conv.op import reference
from h1export.plugins.gpu import device
from h1export.plugins.gpu.kernel import DTYPES


def causal_conv(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the op with the GPU kernel, or with the reference.

    The call waits for no result of the device, so that a CUDA graph can hold it once Triton has compiled the kernel,
    which an equal call before the capture does.
    """
    if refusal(x, state, weight, bias) is not None:
        return reference(x, state, weight, bias)
    return launch.causal_conv(
        x.contiguous(), state.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    )


def refusal(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Return why the kernel cannot take a call, such as dtypes that differ; None if it can.

    The kernel reads memory by the shapes of op.py, so that tensors of other shapes, which broadcast or are an error,
    are left to the reference.
    """
    tensors = {"x": x, "state": state, "weight": weight} | ({} if bias is None else {"bias": bias})
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or x.dtype not in DTYPES:
        return f"the dtypes are {', '.join(sorted(map(str, dtypes)))}"
    if x.ndim != 3 or weight.ndim != 3:
        return f"x and weight have {x.ndim} and {weight.ndim} dimensions, and not 3"
    (batch, tokens, channels) = x.shape
    taps = weight.shape[2]
    shapes = {
        "x": (batch, tokens, channels),
        "state": (batch, channels, taps - 1),
        "weight": (channels, 1, taps),
    } | ({} if bias is None else {"bias": (channels,)})
    if wrong := device.wrong_tensor(tensors, shapes, x.device):
        return wrong
    if x.numel() == 0 or taps < 2:
        return f"x has the shape {tuple(x.shape)}, and there are {taps} taps"
    if max(batch, -(-tokens // launch.MANY_TOKENS.tokens)) > device.GRID_LIMIT:
        return f"batch {batch} and {tokens} tokens exceed a grid"
    return device.refusal(x.device)
