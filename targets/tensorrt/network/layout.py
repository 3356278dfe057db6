"""The network's inputs and outputs, with their names, dtypes and dims, and its profiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch

from h1export.graphs.program import Program
from h1export.model.falcon_h1.states import (
    ATTENTION_MASK,
    BATCH,
    INPUT_IDS,
    LOGITS,
    PAST,
    SEQUENCE,
    StateKind,
    StateTensor,
)
from h1export.targets.tensorrt.options import Compute, TensorRTOptions

MODEL = "model.onnx"
DATA = MODEL + ".data"
WRITE_INDICES = "write_indices"  # int64 [batch]: the column of the keys' buffer that a call's first token gets
# the profiles
DECODE = "decode"
PREFILL = "prefill"
PREFILL_TOKENS = 512  # of one call; longer prompts come in several

Dims = tuple[int | str, ...]
Ports = Mapping[str, tuple[str, Dims]]

OWN: Mapping[Compute, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
FLOAT = ir.DataType.FLOAT
TORCH: Mapping[int, torch.dtype] = {
    FLOAT: torch.float32,
    OWN["fp16"]: torch.float16,
    OWN["bf16"]: torch.bfloat16,
}  # by ONNX's number


@dataclass(frozen=True)
class Profile:
    """The sizes that the builder tunes for: batch to ``batch``, tokens to ``tokens``, best at ``usual`` tokens."""

    name: str
    batch: int
    usual: int
    tokens: int


def profiles(max_batch: int, max_context: int) -> tuple[Profile, Profile]:
    """Decode and prefill. An update of the keys' buffer has to fit into it."""
    longest = min(PREFILL_TOKENS, max_context)
    return Profile(DECODE, max_batch, 1, tokens=1), Profile(PREFILL, max_batch, max(1, longest // 4), tokens=longest)


def dtype(kind: StateKind, own: ir.DataType) -> ir.DataType:
    """Of a state: the recurrent one is float32, because it adds up over thousands of tokens."""
    return FLOAT if kind is StateKind.RECURRENT else own


def _state(tensor: StateTensor, options: TensorRTOptions) -> tuple[str, Dims]:
    """The canonical layouts; keys and values in buffers of ``max_context`` columns."""
    dims = tuple(options.max_context if dim == PAST else dim for dim in tensor.shape)
    return dtype(tensor.kind, OWN[options.compute]).name, dims


def inputs(program: Program, options: TensorRTOptions) -> Ports:
    """The mask has a column for each of the buffer's, 1 for real tokens up to the call's last one."""
    states = {tensor.past: _state(tensor, options) for tensor in program.states.tensors}
    mask = ("INT64", (BATCH, options.max_context))
    return {INPUT_IDS: ("INT64", (BATCH, SEQUENCE)), ATTENTION_MASK: mask, WRITE_INDICES: ("INT64", (BATCH,)), **states}


def outputs(program: Program, options: TensorRTOptions) -> Ports:
    """Every state's output is the memory of its input."""
    logits: Dims = (BATCH, 1 if options.last_logits else SEQUENCE, program.config.vocab_size)
    return {LOGITS: ("FLOAT", logits), **{tensor.present: _state(tensor, options) for tensor in program.states.tensors}}
