"""A session whose states are in a GPU's memory. The engine updates them in place, and decoding replays a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property

import numpy as np
import torch

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import ATTENTION_MASK, INPUT_IDS, LOGITS, Array, Ids, StateSpec, StateTensor
from h1export.runtime.runner import check_call, kept
from h1export.runtime.saved_states import SavedStates
from h1export.runtime.session import WHAT
from h1export.runtime.sharing import OneCall, one_call
from h1export.targets.tensorrt.gpu.engine import LoadedEngine
from h1export.targets.tensorrt.network.layout import DECODE, OWN, TORCH, WRITE_INDICES, dtype
from h1export.targets.tensorrt.network.limits import calls
from h1export.targets.tensorrt.options import TensorRTOptions

Tensors = Mapping[str, torch.Tensor]
WARM_UP = 2  # calls of one token: launched, and recorded


class EngineSession:
    """A session of sequences of ``length`` tokens each, with their ``states`` on the GPU by input name.

    It takes one call at a time. As the states of ``EngineRunner.step`` it is only read, which any number of threads may
    do.
    """

    def __init__(self, engine: LoadedEngine, states: Tensors) -> None:
        self.states = states
        self.length = 0
        self._one_call = OneCall(WHAT)
        self._padded = False
        self._spec = StateSpec.of(engine.artifact.config)
        self._engine = engine
        self._batch = next(iter(states.values())).shape[0]
        self._mask = self._zeros(self._batch, engine.limits.max_context)
        self._write_indices = self._zeros(self._batch)

    @classmethod
    def new(cls, engine: LoadedEngine, batch: int) -> EngineSession:
        """Return ``batch`` sequences before their first token. Raises H1ExportError for more than the engine takes."""
        engine.limits.check_rows("start", batch)
        own = OWN[TensorRTOptions.read(engine.artifact).compute]
        tensors = StateSpec.of(engine.artifact.config).tensors

        def zeros(tensor: StateTensor) -> torch.Tensor:
            shape = tensor.sized(batch, engine.limits.max_context)
            return torch.zeros(shape, dtype=TORCH[dtype(tensor.kind, own)], device=engine.gpu.device)

        with engine.gpu.current():
            return cls(engine, {tensor.past: zeros(tensor) for tensor in tensors})

    def copy(self) -> EngineSession:
        """Return the same sequences in other memory."""
        with self._engine.gpu.current():
            made = EngineSession(self._engine, {name: state.clone() for name, state in self.states.items()})
            made._mask.copy_(self._mask)
        made.length = self.length
        made._padded = self._padded
        return made

    @one_call
    def append(self, ids: Ids, *, keep: int | None = None) -> Array:
        """Return logits float32 [batch, positions, vocab] of the last ``keep`` of ids int64 [batch, new].

        Raises H1ExportError beyond the limits.
        """
        mask = np.ones((len(ids), self.length + ids.shape[-1]), np.int64)
        self._check(ids, mask, keep)
        if ids.shape[1:] != (1,):
            return kept(self.advance(ids, mask), keep)
        with self._engine.gpu.current():
            self._mask[:, self.length] = 1
            self._write_indices.fill_(self.length)
            logits = self._decode(self._on_gpu(ids))
        self.length += 1
        return logits

    def warmed(self) -> EngineSession:
        """Warm up the decoding of single tokens, and return this session. It must not have tokens yet."""
        assert self.length == 0
        with self._engine.gpu.current():
            for _ in range(WARM_UP):
                self._decode(self._zeros(self._batch, 1))
            for state in self.states.values():
                state.zero_()
        return self

    @cached_property
    def _decode(self) -> Decode:
        return Decode(self._engine, self._tensors(self._zeros(self._batch, 1)))

    def advance(self, ids: Ids, mask: Ids) -> Array:
        """Append ``ids`` with pads: mask [batch, length + new] is 1 for real tokens, 0 for pads on the left."""
        self._check(ids, mask)
        self._padded = not mask.all()
        with self._engine.gpu.current():
            self._mask[:, : mask.shape[1]] = self._on_gpu(mask)
            found = [self._call(self._on_gpu(ids[:, part])) for part in calls(ids.shape[1])]
        return np.concatenate(found, axis=1) if self._engine.all_logits else found[-1]

    def snapshot(self) -> dict[str, Array]:
        """Return the states by ``StateTensor.key``, float32 in StateSpec's layouts."""
        with self._engine.gpu.current():
            found = {
                tensor: self.states[tensor.past].to("cpu", torch.float32, copy=True).numpy()
                for tensor in self._spec.tensors
            }
        return {
            tensor.key: array[:, :, : self.length] if tensor.kind.grows else array for tensor, array in found.items()
        }

    @one_call
    def save(self, row: int = 0, start: int = 0) -> SavedStates:
        if self._padded:
            raise H1ExportError("save", "the rows have pads", "save the states of a session without pads")
        return SavedStates.of(self._spec, self.snapshot(), row, start=start, length=self.length)

    @one_call
    def restore(self, saved: SavedStates) -> None:
        saved.check(self._spec, self._engine.limits.max_context)
        with self._engine.gpu.current():
            for tensor in self._spec.tensors:
                state = self.states[tensor.past]
                place = state[:, :, : saved.length] if tensor.kind.grows else state
                place.copy_(torch.from_numpy(saved.arrays[tensor.key]).to(state.device))
            self._mask.zero_()
            self._mask[:, : saved.length] = 1
        self._padded = False
        self.length = saved.length

    def _check(self, ids: Ids, mask: Ids, keep: int | None = None) -> None:
        check_call(ids, mask, self.length, vocab_size=self._engine.artifact.config.vocab_size, keep=keep)
        if len(ids) != self._batch:
            raise H1ExportError("append", f"{len(ids)} rows", f"these are {self._batch} sequences")
        self._engine.limits.check_room("append", mask.shape[1])

    def _call(self, ids: torch.Tensor) -> Array:
        """Compute the next tokens, whose columns are in the mask already."""
        context = self._engine.shared(ids.shape[1])
        tensors = self._tensors(ids)
        context.bind(tensors)
        self._write_indices.fill_(self.length)
        context.launch()
        self.length += ids.shape[1]
        return _on_cpu(tensors[LOGITS])

    def _tensors(self, ids: torch.Tensor) -> Tensors:
        """Return the tensors that a call is bound to; a state's output is the memory of its input."""
        config = self._engine.artifact.config
        tokens = ids.shape[1] if self._engine.all_logits else 1
        logits = torch.empty(self._batch, tokens, config.vocab_size, device=ids.device)
        presents = {tensor.present: self.states[tensor.past] for tensor in StateSpec.of(config).tensors}
        return {
            INPUT_IDS: ids,
            ATTENTION_MASK: self._mask,
            WRITE_INDICES: self._write_indices,
            LOGITS: logits,
            **self.states,
            **presents,
        }

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self._engine.gpu.device)

    def _on_gpu(self, ids: Ids) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(ids)).to(self._engine.gpu.device)


class Decode:
    """Calls of one token on ``tensors``: the first is launched, and a later one is recorded and replayed from then on.

    They have their own context, because a recorded graph has addresses and sizes that no other call may change. Where
    recording fails, every call is launched.
    """

    def __init__(self, engine: LoadedEngine, tensors: Tensors) -> None:
        self._gpu = engine.gpu
        self._tensors = tensors
        self._context = engine.context(DECODE)
        self._context.bind(tensors)
        self._warm = False
        self._tried = False
        self._run: Callable[[], None] = self._context.launch

    def __call__(self, ids: torch.Tensor) -> Array:
        self._tensors[INPUT_IDS].copy_(ids)
        if self._warm and not self._tried and self._context.recordable():
            self._tried = True
            with suppress(RuntimeError, H1ExportError):
                self._run = self._gpu.record(self._context.launch)
        self._run()
        self._warm = True
        return _on_cpu(self._tensors[LOGITS])


def _on_cpu(logits: torch.Tensor) -> Array:
    """Return a copy, once the stream has computed the logits."""
    copied: Array = logits.to("cpu", copy=True).numpy()
    return copied
