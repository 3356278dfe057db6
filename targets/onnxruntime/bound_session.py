"""A session whose states are in buffers that ONNX Runtime reads and writes in place."""

from __future__ import annotations

from typing import Any

import numpy as np

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import ATTENTION_MASK, INPUT_IDS, LOGITS, PAST, Array, Ids, StateSpec
from h1export.runtime.runner import check_call
from h1export.targets.onnx import sdk
from h1export.targets.onnxruntime import state_layout


class BoundSession:
    """A session of ``batch`` sequences with room for ``capacity`` tokens, over an InferenceSession.

    Every state is an input and an output of the InferenceSession at once. GroupQueryAttention takes a longer buffer
    than there are keys, and appends in place where past and present are the same buffer.

    Args:
        session: The InferenceSession.
        states: The states of the model.
        vocab_size: The number of token ids.
        batch: The number of sequences.
        capacity: The number of tokens that each of them may get.
        batched_append: Whether the graph takes several rows when several tokens are appended to a past.
    """

    def __init__(
        self, session: Any, states: StateSpec, vocab_size: int, *, batch: int, capacity: int, batched_append: bool
    ) -> None:
        self._session = session
        self._vocab_size = vocab_size
        self._capacity = capacity
        self._batched_append = batched_append
        sizes = {"batch": batch, PAST: capacity}
        shapes = {
            tensor: [sizes[dim] if isinstance(dim, str) else dim for dim in state_layout.shape(tensor)]
            for tensor in states.tensors
        }
        self._states = {tensor: np.zeros(shape, np.float32) for tensor, shape in shapes.items()}
        self._batch = batch
        self._whole = self._bind(slice(0, batch))
        self.length = 0

    def append(self, ids: Ids) -> Array:
        """Extend every row, and return logits float32 [batch, new or 1, vocab] of ids int64 [batch, new].

        Raises:
            H1ExportError: The ids do not fit the vocabulary, the batch or the capacity.
        """
        end = self.length + ids.shape[-1]
        mask = np.ones((len(ids), end), np.int64)
        check_call(ids, mask, self.length, vocab_size=self._vocab_size)
        if end > self._capacity or len(ids) != self._batch:
            what = f"{len(ids)} rows of {end} tokens"
            raise H1ExportError(
                "append", what, f"there is room for {self._batch} of {self._capacity}; start with a larger capacity"
            )
        if self._batch == 1 or not self.length or ids.shape[1] == 1 or self._batched_append:
            logits = self._run(self._whole, ids, mask)
        else:
            rows = [slice(row, row + 1) for row in range(self._batch)]
            logits = np.concatenate([self._run(self._bind(row), ids[row], mask[row]) for row in rows])
        self.length = end
        return logits

    def _bind(self, rows: slice) -> Any:
        """Return a binding of ``rows`` of every state, which shares the memory of the arrays."""
        binding = self._session.io_binding()
        value_of = sdk.onnxruntime().OrtValue.ortvalue_from_numpy
        for tensor, state in self._states.items():
            value = value_of(state[rows])
            binding.bind_ortvalue_input(tensor.past, value)
            binding.bind_ortvalue_output(tensor.present, value)
        return binding

    def _run(self, binding: Any, ids: Ids, mask: Ids) -> Array:
        binding.bind_cpu_input(INPUT_IDS, np.ascontiguousarray(ids))
        binding.bind_cpu_input(ATTENTION_MASK, mask)
        binding.bind_output(LOGITS)
        self._session.run_with_iobinding(binding)
        logits: Array = binding.get_outputs()[-1].numpy()  # outputs are in the order of binding
        return logits
