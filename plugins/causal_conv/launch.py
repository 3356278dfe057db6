"""h1::causal_conv on a GPU: one kernel, whose tiles depend on whether there is one token or many."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from h1export.plugins.gpu.kernel import DTYPES, Kernel, Launch, arguments, run

OP = "causal_conv"
CAUSAL_CONV = arguments("x:*dtype state:*dtype weight:*dtype bias:*dtype T:i32 channels:i32 y:*dtype new_state:*dtype")


class Tile(NamedTuple):
    """Tokens and channels of one program."""

    tokens: int
    channels: int
    warps: int


ONE_TOKEN = Tile(1, 128, 1)
MANY_TOKENS = Tile(16, 128, 4)


def kernel(dtype: str, taps: int, bias: bool, one_token: bool) -> Kernel:
    """Compiled, it takes channels that are a multiple of 16 only, which every published model's are."""
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


def launch(kernel: Kernel, batch: int, tokens: int, channels: int) -> Launch:
    """One launch covers all of a call."""
    constants = dict(kernel.constants)
    values = {"T": tokens, "channels": channels}
    grid = (-(-channels // constants["BC"]), -(-tokens // constants["BT"]), batch)
    return Launch(kernel, grid, tuple(values.get(argument, argument) for argument, _ in kernel.arguments))


def causal_conv(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, new_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """op.py's function by this kernel. ``new_state``: memory for the state, which may be ``state`` itself."""
    batch, tokens, channels = x.shape
    chosen = kernel(DTYPES[x.dtype], weight.shape[2], bias is not None, one_token=tokens == 1)
    y = torch.empty_like(x)
    after = torch.empty_like(state) if new_state is None else new_state
    tensors = {
        "x": x,
        "state": state,
        "weight": weight,
        "bias": weight if bias is None else bias,
        "y": y,
        "new_state": after,
    }
    run([launch(chosen, batch, tokens, channels)], tensors)
    return y, after
