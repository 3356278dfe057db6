"""The op h1::causal_conv: a depthwise causal convolution with a carried state, followed by SiLU.

Source: the ``conv1d`` of Mamba-2 (Dao and Gu 2024, section 5.2) as in transformers' ``FalconH1Mixer``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute y[b, s, c] = silu(bias[c] + sum_i weight[c, 0, i] * xs[b, s + i, c]) with xs = state followed by x.

    All tensors share one dtype.

    Args:
        x: [batch, seq, channels]; padded positions must be zero, like the positions before the first token.
        state: [batch, channels, taps - 1], the inputs before x, oldest first.
        weight: [channels, 1, taps], as Conv1d stores it.
        bias: [channels] or None.

    Returns:
        y [batch, seq, channels] and the state after x [batch, channels, taps - 1]; both are new tensors.
    """
    inputs = torch.cat([state, x.transpose(1, 2)], dim=-1)
    if 0 in x.shape:  # conv1d refuses an input without a single window
        return torch.empty_like(x, memory_format=torch.contiguous_format), state.clone(
            memory_format=torch.contiguous_format
        )
    y = F.silu(F.conv1d(inputs, weight, bias, groups=weight.shape[0]))
    new_state = inputs.narrow(2, x.shape[1], state.shape[2]).clone(memory_format=torch.contiguous_format)
    return y.transpose(1, 2).contiguous(), new_state


causal_conv = torch.library.custom_op("h1::causal_conv", mutates_args=())(reference)


@causal_conv.register_fake
def _(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape)
