"""Decode at fixed shapes and addresses, which ONNX Runtime's CUDA provider captures once and replays as a CUDA graph.

What this file relies on, in ONNX Runtime 1.31 (core/session/inference_session.cc, core/providers/cuda/cuda_graph.cc and
cuda_execution_provider.cc):

- A captured graph has the addresses, the shapes and the CPU's values of the run that captured it. So every input and
  output is one buffer on the device, the mask has the columns of the whole capacity, and the graph of --graph cuda
  computes what changes from the mask (emit/cuda.py).
- The run that captures executes the model more than once: first without the graph, then by it. States in place would
  advance each time, so they are put back, and the graph is replayed for the step itself.
- A captured graph belongs to the thread that captured it, and to the number in the run's options.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from h1export.model.falcon_h1.states import ATTENTION_MASK, INPUT_IDS, LOGITS, Array, Ids
from h1export.targets.onnx import sdk
from h1export.targets.onnxruntime.calls import refused
from h1export.targets.onnxruntime.run_options import run_options

_NUMBERS = itertools.count(1)  # of captured graphs; no two sessions share one, because their buffers differ


class FixedDecode:
    """Steps of one token a row over the buffers of a session; on the CPU provider the same runs are not captured.

    Args:
        session: The InferenceSession.
        binding: An IOBinding of its states, past and present; ids, mask and logits are bound here.
        carried: The OrtValues of the states that a step reads and writes whole.
        device: onnxruntime's name of the device that has the states.
        batch: The number of rows.
        capacity: The columns of the keys' and values' buffers.
        vocab_size: The number of token ids.
    """

    def __init__(
        self,
        session: Any,
        binding: Any,
        carried: Sequence[Any],
        *,
        device: str,
        batch: int,
        capacity: int,
        vocab_size: int,
    ) -> None:
        self._session = session
        self._binding = binding
        self._carried = carried
        self._columns = np.zeros((batch, capacity), np.int64)
        self._columns[:, -1] = 1  # the new token's
        value_of = sdk.onnxruntime().OrtValue.ortvalue_from_numpy
        self._ids = value_of(np.zeros((batch, 1), np.int64), device, 0)
        self._mask = value_of(self._columns.copy(), device, 0)  # on the CPU an OrtValue is the array it is made of
        self._logits = value_of(np.zeros((batch, 1, vocab_size), np.float32), device, 0)
        binding.bind_ortvalue_input(INPUT_IDS, self._ids)
        binding.bind_ortvalue_input(ATTENTION_MASK, self._mask)
        binding.bind_ortvalue_output(LOGITS, self._logits)
        self._options = run_options(next(_NUMBERS))
        self._here = threading.local()

    def step(self, ids: Ids, length: int) -> Array:
        """Return the logits, float32 [batch, 1, vocab], after one more token of each row.

        Args:
            ids: int64 [batch, 1].
            length: The tokens so far, at least 1 and less than the capacity.
        """
        self._columns[:, :-1] = np.arange(self._columns.shape[1] - 1) < length  # restored states may have fewer tokens
        self._ids.update_inplace(np.ascontiguousarray(ids))
        self._mask.update_inplace(self._columns)
        if not getattr(self._here, "captured", False):
            self._capture()
        self._run()
        return np.array(self._logits.numpy())

    def _capture(self) -> None:
        """Run the step, which captures it, and put the states back."""
        before = [np.array(value.numpy()) for value in self._carried]
        self._run()
        for value, state in zip(self._carried, before, strict=True):
            value.update_inplace(state)
        self._here.captured = True

    def _run(self) -> None:
        with refused("onnxruntime", "cannot compute the graph of this artifact"):
            self._session.run_with_iobinding(self._binding, self._options)
