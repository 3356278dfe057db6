"""The limits of the CUDA provider's kernels that this graph could use, in one table, and the choice by them.

Facts of onnxruntime-gpu 1.31.1 (CUDA 13): the dtypes are those of the kernel classes in its CUDA provider's library;
the sizes are from onnxruntime/contrib_ops/cuda/bert/ of microsoft/onnxruntime.

- LinearAttention (linear_attention.cc): float, fp16, bf16; its state has the dtype of its inputs.
- GatedDeltaNet (gated_delta_net.cc, gated_delta_net_plan.h): float, fp16, bf16; its state is float32, past and present
  may be one buffer. A state of 64, 128 or 256 columns is held in registers. For any other size, a block holds
  [d_state, d_head] in shared memory. Only fp16 inputs of 128 by 128 have a chunked kernel, which rounds inside a chunk.
- CausalConvWithState (causal_conv_with_state_impl.cu): float, fp16, bf16, either order of axes; its state has the dtype
  of its inputs, and is read whole before it is written. A block of a prefill holds the tokens of a call in shared
  memory, and channels are an axis of the grid.
- GroupQueryAttention (group_query_attention.cc): fp16, bf16; past and present may be one buffer; several rows may not
  take several tokens after a past. total_sequence_length is read on the CPU, so that a captured CUDA graph repeats it;
  seqlens_k is read on the device, by row, and says where a new key goes and which keys are read (fixed_decode.py).
  A call with attention_bias takes the unfused kernels.
- Split and Concat copy sizes and addresses from the CPU; since 1.31 a captured graph keeps what it copies
  (pull request 32121).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a program that runs artifacts does without torch
    from h1export.targets.sizes import ScanSizes

FLOAT_BYTES = 4


@dataclass(frozen=True)
class KernelLimits:
    """What a GPU and the kernels on it can take.

    Attributes:
        shared_memory: the bytes that a block may ask for; 99 KiB is the least of compute capability 8.0 and later
            (CUDA C++ Programming Guide, technical specifications: 8.6, 8.9 and 12.0).
        grid_axis: the largest second or third axis of a grid.
        register_states: the d_state for which the scan's state is in registers.
        batched_tokens: the most tokens of a call for which a block of the convolution takes several channels.
        batched_channels: the number of these channels.
    """

    shared_memory: int = 99 * 1024
    grid_axis: int = 65535
    register_states: tuple[int, ...] = (64, 128, 256)
    batched_tokens: int = 128
    batched_channels: int = 4


LIMITS = KernelLimits()


def scan_refusal(sizes: ScanSizes, limits: KernelLimits = LIMITS) -> str:
    """Return why GatedDeltaNet cannot take a scan of these sizes; an empty string: it can.

    LinearAttention is no other choice: in float32 it takes hardly a size more (its block lacks 2 rows of the same
    state), and in 16 bits it rounds the state at every token.
    """
    if sizes.heads % sizes.groups:
        return f"{sizes.heads} heads are no multiple of {sizes.groups} groups"
    if sizes.heads > limits.grid_axis:
        return f"{sizes.heads} heads, and a grid has {limits.grid_axis}"
    if sizes.d_state in limits.register_states:
        return ""
    floats = sizes.d_state * sizes.d_head + 3 * sizes.d_state + max(sizes.d_head, 2)
    needed = floats * FLOAT_BYTES
    return "" if needed <= limits.shared_memory else f"a state of {needed} bytes in {limits.shared_memory}"


def conv_refusal(channels: int, taps: int, limits: KernelLimits = LIMITS) -> str:
    """Return why CausalConvWithState cannot take a convolution of these sizes; an empty string: it can."""
    if channels > limits.grid_axis:
        return f"{channels} channels, and a grid has {limits.grid_axis}"
    needed = limits.batched_channels * (limits.batched_tokens + 2 * taps - 1) * FLOAT_BYTES
    return "" if needed <= limits.shared_memory else f"{taps} taps need {needed} bytes in {limits.shared_memory}"


def longest_call(taps: int, limits: KernelLimits = LIMITS) -> int:
    """Return the most tokens that CausalConvWithState takes in one call."""
    return limits.shared_memory // FLOAT_BYTES - (2 * taps - 1)
