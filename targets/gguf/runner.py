"""Run an artifact with llama.cpp."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock

import numpy as np

from h1export import host
from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array, Ids, StateSpec
from h1export.runtime.runner import Limits, Provenance, check_call, kept
from h1export.runtime.saved_states import SavedStates
from h1export.runtime.session import WHAT
from h1export.runtime.sharing import Home, OneCall, one_call
from h1export.targets.gguf import sdk, state_bytes
from h1export.targets.gguf.llama import SEQUENCE, Context, Model
from h1export.targets.gguf.options import GgufOptions
from h1export.targets.gguf.read_back import GgufFile, StoredFloats, StoredWeights
from h1export.targets.gguf.types import TensorType
from h1export.targets.gguf.vocabulary import VOCABULARY
from h1export.targets.gguf.writer import MODEL

NO_PADS = "one sequence at a time, without padding on the left"
CACHE = (
    "keys and values are float32 and flash attention is off; llama.cpp's own defaults round both to fp16: "
    "give it -ctk f32 -ctv f32 -fa off for these results"
)
FIRST_ROOM = 512  # tokens of the context that ``step`` opens first


@dataclass(frozen=True, eq=False)
class States:
    """The states of a sequence of ``length`` tokens, as llama.cpp saves them; empty before the first token."""

    length: int
    data: state_bytes.Bytes


class LlamaRunner:
    """A Runner over model.gguf in llama.cpp.

    Args:
        artifact: What the target has written.
        threads: The number of threads; 0 means one a core.
        float32: Whether a copy of the file in float32 runs, because llama.cpp rounds activations to 8 bits for
            integers, and to fp16 or bf16 for such weights.
    """

    def __init__(self, artifact: Artifact, threads: int, float32: bool) -> None:
        self._artifact = artifact
        self._home = Home(str(artifact.folder))
        self._config = artifact.config
        self._options = GgufOptions.read(artifact)
        self._threads = threads or host.cores()
        self._path = artifact.folder / MODEL
        self._file = GgufFile(self._path)
        rounded = any(kind is not TensorType.F32 for kind in self._file.kinds.values())
        self._float32 = float32 or not rounded
        self._model = self._load_float32() if float32 and rounded else Model(self._path)
        if self._model.vocab_size != self._config.vocab_size:
            what = f"has {self._model.vocab_size} tokens, and config.json {self._config.vocab_size}"
            raise H1ExportError(self._path, what, "build the artifact again")
        self._context: Context | None = None
        self._held: States | None = None  # what the context goes on from
        self._lock = Lock()  # of both: threads may share a Runner

    def _load_float32(self) -> Model:
        with tempfile.TemporaryDirectory(prefix="h1export-gguf-") as folder:
            path = Path(folder) / MODEL
            self._file.write_float32(path)
            return Model(path)  # mapped: the file may go

    @property
    def config(self) -> FalconH1Config:
        return self._config

    @property
    def limits(self) -> Limits:
        return Limits(max_batch=1, all_logits=not self._options.last_logits)

    @property
    def provenance(self) -> Provenance:
        return Provenance(
            kernels=f"llama.cpp in xllamacpp {sdk.version()}",
            float32=self._float32,
            scale_rounding=self._scale_rounding,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        vocabulary = str(self._artifact.manifest.requirements.get(VOCABULARY, ""))
        return (NO_PADS, CACHE, *([f"vocabulary: {vocabulary}"] if vocabulary else []), *self._coarse)

    @cached_property
    def _scale_rounding(self) -> float:
        return self._file.scale_rounding()

    @cached_property
    def _coarse(self) -> tuple[str, ...]:
        return coarse_notes(self._file)

    def initial(self, batch: int) -> States:
        if batch != 1:
            raise H1ExportError("initial", f"{batch} rows", f"llama.cpp takes {NO_PADS} here")
        return States(0, np.zeros(0, np.uint8))

    def length(self, states: States) -> int:
        return states.length

    def step(self, ids: Ids, mask: Ids, states: States) -> tuple[Array, States]:
        self._home.check()
        check_call(ids, mask, states.length, vocab_size=self._config.vocab_size)
        if len(ids) != 1 or not mask.all():
            raise H1ExportError("step", f"{len(ids)} rows, {int((mask == 0).sum())} pads", f"llama.cpp takes {NO_PADS}")
        end = states.length + ids.shape[1]
        with self._lock:
            context = self._with_room(end)
            if states is not self._held:
                self.resume(context, states)
            self._held = None  # until the call has succeeded
            logits = context.decode(ids[0], states.length, every=self.limits.all_logits)
            after = States(end, context.state())
            self._held = after
        return logits[None], after

    def resume(self, context: Context, states: States) -> None:
        """Let ``context`` go on from ``states``."""
        if states.length:
            context.restore(states.data)
        else:
            context.clear()

    def _with_room(self, tokens: int) -> Context:
        if self._context is None or self._context.room < tokens:
            self._context, self._held = None, None  # its memory first
            self._context = self.open(max(FIRST_ROOM, 2 * tokens))
        return self._context

    def open(self, tokens: int) -> Context:
        """Open a context for ``tokens`` tokens."""
        return Context(self._model, tokens, self._threads)

    def start(self, batch: int, capacity: int) -> LlamaSession:
        self._home.check()
        self.initial(batch)
        return LlamaSession(self, capacity, self.limits.all_logits)

    def snapshot(self, states: States) -> dict[str, Array]:
        if not states.length:
            return StateSpec.of(self._config).zeros(1)
        try:
            return state_bytes.read(states.data, self._config, states.length, sequence=SEQUENCE)
        except state_bytes.StateFormatError as error:
            what = f"llama.cpp saves states in another form ({error})"
            raise H1ExportError(self._path, what, sdk.INSTALL) from None

    def restored(self, saved: SavedStates, batch: int) -> States:
        self.initial(batch)
        data = state_bytes.write(dict(saved.arrays), self._config, saved.length, sequence=SEQUENCE)
        return States(saved.length, data)

    def stored_weights(self) -> StoredWeights:
        return StoredWeights(self._artifact)

    def stored_floats(self) -> StoredFloats:
        return StoredFloats(self._artifact)


class LlamaSession:
    """A session of one sequence, whose states stay in llama.cpp. It takes one call at a time."""

    def __init__(self, runner: LlamaRunner, capacity: int, every: bool) -> None:
        self._runner = runner
        self._capacity = capacity
        self._every = every
        self._context = runner.open(capacity)
        self._one_call = OneCall(WHAT)
        self.length = 0

    @one_call
    def append(self, ids: Ids, *, keep: int | None = None) -> Array:
        end = self.length + ids.shape[-1]
        mask = np.ones((len(ids), end), np.int64)
        check_call(ids, mask, self.length, vocab_size=self._runner.config.vocab_size, keep=keep)
        if end > self._capacity or len(ids) != 1:
            what = f"{len(ids)} rows of {end} tokens"
            next_step = f"there is room for one of {self._capacity}; start with a larger capacity"
            raise H1ExportError("append", what, next_step)
        logits = self._context.decode(ids[0], self.length, every=self._every and keep != 1)
        self.length = end
        return kept(logits[None], keep)

    @one_call
    def save(self, row: int = 0, start: int = 0) -> SavedStates:
        data = self._context.state() if self.length else np.zeros(0, np.uint8)
        found = self._runner.snapshot(States(self.length, data))
        return SavedStates.of(StateSpec.of(self._runner.config), found, row, start=start, length=self.length)

    @one_call
    def restore(self, saved: SavedStates) -> None:
        saved.check(StateSpec.of(self._runner.config), self._capacity)
        self._runner.resume(self._context, self._runner.restored(saved, 1))
        self.length = saved.length


def coarse_notes(file: GgufFile) -> tuple[str, ...]:
    """Return a line for each tensor whose scales, with µP in them, are too small for the whole precision of fp16."""
    return tuple(
        f"{name}: {share:.1%} of its scales, µP included, are subnormal in fp16, and so less precise"
        for name, share in file.coarse().items()
    )
