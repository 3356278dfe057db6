"""A session whose states are in buffers that ONNX Runtime reads and writes in place, on the CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import (
    ALL,
    ATTENTION_MASK,
    INPUT_IDS,
    KEPT,
    LOGITS,
    Array,
    Ids,
    StateSpec,
    StateTensor,
)
from h1export.runtime.runner import check_call, kept
from h1export.runtime.saved_states import SavedStates, check_part
from h1export.runtime.session import WHAT
from h1export.runtime.sharing import OneCall, one_call
from h1export.targets.onnx import sdk
from h1export.targets.onnxruntime.bfloat16 import element_type, in_numpy
from h1export.targets.onnxruntime.calls import refused
from h1export.targets.onnxruntime.fixed_decode import FixedDecode
from h1export.targets.onnxruntime.run_options import run_options
from h1export.targets.onnxruntime.state_layout import StateLayout

DEVICE_ID = 0  # the device that the provider takes where its options name none


@dataclass(frozen=True)
class BoundGraph:
    """An InferenceSession and what a BoundSession has to know about its graph.

    Attributes:
        session: The InferenceSession.
        state_layout: How the graph stores states.
        states: The states of the model.
        vocab_size: The number of token ids.
        batched_append: Whether the graph takes several rows when several tokens are appended to a past.
        device: onnxruntime's name of the device that has the states, "cpu" or "cuda".
        longest_call: The most tokens of a row in one call; None means that there is no limit.
        fixed_decode: Whether a call of one token after others runs at fixed shapes, so that it can be captured.
        asks_for_logits: Whether an input of the graph says how many positions get logits.
    """

    session: Any
    state_layout: StateLayout
    states: StateSpec
    vocab_size: int
    batched_append: bool
    device: str = "cpu"
    longest_call: int | None = None
    fixed_decode: bool = False
    asks_for_logits: bool = False


class BoundSession:
    """A session of ``batch`` sequences with room for ``capacity`` tokens, over an InferenceSession.

    Every state is an input and an output of the InferenceSession at once. GroupQueryAttention takes a longer buffer
    than there are keys, and appends in place where past and present are the same buffer. The scan's kernels and the
    convolution's read a state before they write it. Token ids, masks and logits are copied by ONNX Runtime. The buffers
    are this session's alone, and it takes one call at a time.

    Args:
        graph: The InferenceSession and its graph.
        batch: The number of sequences.
        capacity: The number of tokens that each of them may get.
    """

    def __init__(self, graph: BoundGraph, batch: int, capacity: int) -> None:
        self._graph = graph
        self._capacity = capacity
        value_of = sdk.onnxruntime().OrtValue.ortvalue_from_numpy
        self._layout = graph.state_layout
        self._states: dict[str, Any] = {}  # by the name of the input
        for tensor in graph.states.tensors:
            shape = self._layout.sized(tensor, batch, capacity)
            zeros = np.zeros(shape, in_numpy(self._layout.dtype(tensor.kind)))  # bytes, which are bound by address
            self._states[tensor.past] = value_of(zeros, self._graph.device, DEVICE_ID)
        self._batch = batch
        self._one_call = OneCall(WHAT)
        self._whole = self._bind(0, batch)
        self._fixed = self._fixed_decode() if graph.fixed_decode else None
        self.length = 0

    @one_call
    def append(self, ids: Ids, *, keep: int | None = None) -> Array:
        """Extend every row by ids int64 [batch, new], and return logits float32 [batch, positions, vocab].

        Raises:
            H1ExportError: The ids do not fit the vocabulary, the batch, the capacity or the graph's longest call, or
                ``keep`` is no positive number.
        """
        end = self.length + ids.shape[-1]
        mask = np.ones((len(ids), end), np.int64)
        check_call(ids, mask, self.length, vocab_size=self._graph.vocab_size, keep=keep)
        check_length(ids, self._graph.longest_call)
        if end > self._capacity or len(ids) != self._batch:
            what = f"{len(ids)} rows of {end} tokens"
            raise H1ExportError(
                "append", what, f"there is room for {self._batch} of {self._capacity}; start with a larger capacity"
            )
        if self._fixed is not None and self.length and ids.shape[1] == 1:
            logits = self._fixed.step(ids, self.length)
        elif self._batch == 1 or not self.length or ids.shape[1] == 1 or self._graph.batched_append:
            logits = run_bound(self._graph, self._whole, ids, mask=mask, keep=keep)
        else:
            parts = [np.s_[row : row + 1] for row in range(self._batch)]
            logits = np.concatenate(
                [
                    run_bound(self._graph, self._bind(part.start, 1), ids[part], mask=mask[part], keep=keep)
                    for part in parts
                ]
            )
        self.length = end
        return logits

    def _fixed_decode(self) -> FixedDecode:
        return FixedDecode(
            self._graph.session,
            self._bind(0, self._batch),
            [self._states[tensor.past] for tensor in self._graph.states.tensors if not tensor.kind.grows],
            device=self._graph.device,
            batch=self._batch,
            capacity=self._capacity,
            vocab_size=self._graph.vocab_size,
        )

    @one_call
    def save(self, row: int = 0, start: int = 0) -> SavedStates:
        check_part(row, self._batch, start, length=self.length)
        found = {}
        for tensor in self._graph.states.tensors:
            state = self._states[tensor.past].numpy()[row : row + 1]  # a copy, from the device if need be
            used = state[:, :, : self.length] if tensor.kind.grows else state
            found[tensor.key] = self._layout.canonical(tensor.kind, used.view(self._layout.dtype(tensor.kind)))
        return SavedStates.of(self._graph.states, found, 0, start=start, length=self.length)

    @one_call
    def restore(self, saved: SavedStates) -> None:
        saved.check(self._graph.states, self._capacity)
        for tensor in self._graph.states.tensors:
            value = self._states[tensor.past]
            whole = np.ascontiguousarray(value.numpy())
            place = np.s_[:, :, : saved.length] if tensor.kind.grows else np.s_[:]
            whole[place] = self._layout.stored(tensor.kind, saved.arrays[tensor.key]).view(whole.dtype)
            value.update_inplace(whole)
        self.length = saved.length

    def _bind(self, first: int, rows: int) -> Any:
        """Return a binding of ``rows`` rows of every state from ``first`` on; the batch is the first axis."""
        binding = self._graph.session.io_binding()
        for tensor in self._graph.states.tensors:
            value = self._states[tensor.past]
            dtype = np.dtype(self._layout.dtype(tensor.kind))
            shape = [rows, *value.shape()[1:]]
            address = value.data_ptr() + first * prod(shape[1:]) * dtype.itemsize
            bind_state(binding, tensor, shape, address=address, device=self._graph.device, dtype=dtype)
        return binding


def run_bound(graph: BoundGraph, binding: Any, ids: Ids, *, mask: Ids, keep: int | None = None) -> Array:
    """Run a graph whose states are bound; return logits float32 [batch, positions, vocab] of the last ``keep`` tokens.

    None means as many as the graph gives.
    """
    binding.bind_cpu_input(INPUT_IDS, np.ascontiguousarray(ids))
    binding.bind_cpu_input(ATTENTION_MASK, mask)
    if graph.asks_for_logits:
        asked = sdk.onnxruntime().OrtValue.ortvalue_from_numpy(np.array(keep or ALL, np.int64))  # outlives the run
        binding.bind_ortvalue_input(KEPT, asked)  # bind_cpu_input knows no input that has a default
    binding.bind_output(LOGITS)
    with refused("onnxruntime", "cannot compute the graph of this artifact"):
        graph.session.run_with_iobinding(binding, run_options())
    logits: Array = binding.get_outputs()[-1].numpy()  # outputs are in the order of binding
    return logits if graph.asks_for_logits else kept(logits, keep)


def bind_state(
    binding: Any,
    tensor: StateTensor,
    shape: Sequence[int],
    *,
    address: int,
    device: str = "cpu",
    dtype: np.dtype[Any],
) -> None:
    """Let a state be read from, and written to, the memory at ``address``."""
    for bind, name in ((binding.bind_input, tensor.past), (binding.bind_output, tensor.present)):
        bind(name, device, DEVICE_ID, element_type(dtype), shape, address)


def check_length(ids: Ids, longest: int | None) -> None:
    """Raise H1ExportError where a call has more tokens than the kernels of the graph take."""
    if longest is not None and ids.shape[1] > longest:
        what = f"{ids.shape[1]} tokens in one call, and its kernels take {longest}"
        raise H1ExportError("input_ids", what, "pass them in several calls")
