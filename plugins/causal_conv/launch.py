"""The launch of h1::causal_conv on a GPU: one kernel, whose tile depends on whether there is one token or many."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from h1export.plugins.gpu.kernel import DTYPES, Kernel, Launch, arguments, run

OP = "causal_conv"
CAUSAL_CONV = arguments("x:*dtype state:*dtype weight:*dtype bias:*dtype T:i32 channels:i32 y:*dtype new_state:*dtype")


class Tile(NamedTuple):
    """The tokens, channels and warps of one program."""

    tokens: int
    channels: int
    warps: int


ONE_TOKEN = Tile(1, 128, 1)
MANY_TOKENS = Tile(16, 128, 4)


@lru_cache(maxsize=1024)
def kernel(dtype: str, taps: int, bias: bool, *, one_token: bool) -> Kernel:
    """Return the kernel for a dtype, a number of taps, and one token or many.

    The compiled kernel requires a number of channels that is a multiple of 16; every published model has one.

    Args:
        dtype: "fp16", "bf16" or "fp32".
        taps: the kernel size of the convolution.
        bias: whether the convolution has a bias.
        one_token: whether the sequence has a single token.
    """
    tile = ONE_TOKEN if one_token else MANY_TOKENS
    constants = (("TAPS", taps), ("HAS_BIAS", int(bias)), ("BT", tile.tokens), ("BC", tile.channels))
    return Kernel(
        OP,
        "causal_conv",
        dtype,
        arguments=CAUSAL_CONV,
        constants=constants,
        warps=tile.warps,
        stages=1,
        aligned=("channels",),
    )


def launch(kernel: Kernel, batch: int, tokens: int, *, channels: int) -> Launch:
    """Return the one launch that covers a call on x [batch, tokens, channels]."""
    constants = dict(kernel.constants)
    sizes = {"T": tokens, "channels": channels}
    grid = (-(-channels // constants["BC"]), -(-tokens // constants["BT"]), batch)
    return Launch(kernel, grid, tuple(sizes.get(argument, argument) for argument, _ in kernel.arguments))


def causal_conv(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, *, new_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the op of op.py with the GPU kernel; the arguments and results are the op's.

    Args:
        x: as in op.py.
        state: as in op.py.
        weight: as in op.py.
        bias: as in op.py.
        new_state: the tensor to write the new state to, which may be ``state`` itself; None allocates one.

    Raises:
        H1ExportError: Triton is not installed, or a tensor is not contiguous or has another dtype than x.
    """
    batch, tokens, channels = x.shape
    chosen_kernel = kernel(DTYPES[x.dtype], weight.shape[2], bias is not None, one_token=tokens == 1)
    y = torch.empty_like(x)
    state_after = torch.empty_like(state) if new_state is None else new_state
    tensors = {
        "x": x,
        "state": state,
        "weight": weight,
        "bias": weight if bias is None else bias,
        "y": y,
        "new_state": state_after,
    }
    run([launch(chosen_kernel, batch, tokens, channels=channels)], tensors)
    return y, state_after
