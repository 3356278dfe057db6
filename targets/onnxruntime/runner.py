"""Run an artifact with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.packed_format import ORDER
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.probes import PREFIX, probes_in
from h1export.model.falcon_h1.states import ALL, ATTENTION_MASK, INPUT_IDS, KEPT, LOGITS, Array, Ids
from h1export.runtime.rows import Rows
from h1export.runtime.runner import Limits, Provenance, RestorableSession, check_call
from h1export.runtime.saved_states import SavedStates
from h1export.runtime.session import SteppedSession
from h1export.runtime.sharing import Home
from h1export.targets.onnx import sdk
from h1export.targets.onnx.column_major import CODES, SCALES, ZEROS
from h1export.targets.onnx.read_back import StoredWeights
from h1export.targets.onnxruntime import native_library
from h1export.targets.onnxruntime.bfloat16 import run
from h1export.targets.onnxruntime.bound_rows import BoundRows
from h1export.targets.onnxruntime.bound_session import BoundGraph, BoundSession, check_length
from h1export.targets.onnxruntime.calls import refused
from h1export.targets.onnxruntime.inference_session import NATIVE_MODEL, asks_for_logits, open_inference_session
from h1export.targets.onnxruntime.layouts import LAYOUTS
from h1export.targets.onnxruntime.options import OrtOptions
from h1export.targets.onnxruntime.read_back import ROWS, TABLE
from h1export.targets.onnxruntime.variants import CUDA, variant_in
from h1export.targets.options import Kernels

# suffixes of the names of initializers from which stored weights are read
STORED_SUFFIXES = (CODES, CODES + ROWS, SCALES, ZEROS, TABLE)
ROUNDED_LEVEL = 4  # the accuracy level that rounds activations to int8
BATCHED_APPEND = (
    "GroupQueryAttention takes one row at a time when several tokens are appended to a cache: "
    "h1export runs such a batch row by row, other clients must do the same"
)
States = dict[str, npt.NDArray[Any]]


class OnnxRuntimeRunner:
    """A Runner over the layout's graph or model.native.onnx. Its states are arrays by input name, in its layouts.

    Threads may share it: they run in one InferenceSession at the same time, except where calls are captured as CUDA
    graphs, which ONNX Runtime allows one call at a time; then they wait for each other.

    Args:
        artifact: What the target has written.
        threads: The number of threads; 0 leaves it to onnxruntime.
        float32: Whether the graph computes in float32 where the artifact rounds activations.
        kernels: Which of the two graphs runs, see ``targets.loading.Load``.
    """

    def __init__(self, artifact: Artifact, threads: int, float32: bool, *, kernels: Kernels) -> None:
        self._artifact = artifact
        self._home = Home(str(artifact.folder))
        self._config = artifact.config
        self._options = OrtOptions.read(artifact)
        self._layout = LAYOUTS[self._options.layout]
        self._states = self._layout.states(self._config)
        self._variant = variant_in(artifact)
        rounded = bool(self._variant.state_layout.dtypes) or (
            bool(artifact.manifest.weights) and self._options.accuracy_level == ROUNDED_LEVEL
        )
        self._float32 = float32 or not rounded
        # in float32, attention is computed on the CPU: the CUDA provider has no GroupQueryAttention for it
        self._device = "cuda" if self._variant.provider == CUDA and not float32 else "cpu"
        layout = self._variant.state_layout
        self._state_layout = replace(layout, dtypes={}) if float32 else layout
        self._choose(threads, float32, kernels)
        self._session = self._open(captured=self._options.captured_decode and not float32)
        self._past = next(tensor.past for tensor in self._states.tensors if tensor.kind.grows)
        self._outputs = [LOGITS, *(tensor.present for tensor in self._states.tensors)]

    def _choose(self, threads: int, float32: bool, kernels: Kernels) -> None:
        """Set who computes the graph, and how a session with it is opened; arguments and errors are the class's."""
        self._library, self._fallback = _library(self._artifact, kernels)
        self._kernels = (
            f"{'onnxruntime' if self._library is None else 'h1export in onnxruntime'} {sdk.onnxruntime().__version__}"
        )
        self._open = partial(
            open_inference_session,
            self._artifact,
            self._variant,
            threads,
            float32=float32,
            library=self._library,
        )

    @cached_property
    def _asks(self) -> bool:
        return asks_for_logits(self._session)

    @cached_property
    def _every(self) -> States:
        """What a call for all logits gives the graph beside ids, mask and states."""
        return {KEPT: np.array(ALL, np.int64)} if self._asks else {}

    def _run(self, session: Any, names: Sequence[str], feeds: States) -> list[npt.NDArray[Any]]:
        """Return the outputs of these names; whoever computes raises exceptions of its own."""
        with refused(self._artifact.folder, f"{self._kernels} cannot compute its graph"):
            return run(session, names, feeds)

    @property
    def config(self) -> FalconH1Config:
        return self._config

    @property
    def limits(self) -> Limits:
        return Limits(all_logits=not self._options.last_logits)

    @property
    def provenance(self) -> Provenance:
        return Provenance(
            kernels=self._kernels,
            gpu="CUDA" if self._variant.provider == CUDA else "",
            float32=self._float32,
            fallback=self._fallback,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        return () if self._batched_append else (BATCHED_APPEND,)

    @property
    def _batched_append(self) -> bool:
        return self._variant.batched_append or self._library is not None

    @property
    def _longest_call(self) -> int | None:
        longest = self._variant.longest_call
        return None if longest is None else longest(self._config.mamba_d_conv)

    def initial(self, batch: int) -> States:
        layout = self._state_layout
        return {t.past: np.zeros(layout.sized(t, batch, 0), layout.dtype(t.kind)) for t in self._states.tensors}

    def step(self, ids: Ids, mask: Ids, states: States) -> tuple[Array, States]:
        self._home.check()
        past = self.length(states)
        check_call(ids, mask, past, vocab_size=self._config.vocab_size)
        check_length(ids, self._longest_call)
        if ids.shape[0] > 1 and ids.shape[1] > 1 and past > 0 and not self._batched_append:
            return self._row_by_row(ids, mask, states)
        feeds = {INPUT_IDS: ids, ATTENTION_MASK: mask, **states, **self._every}
        logits, *present = self._run(self._session, self._outputs, feeds)
        return logits, {tensor.past: state for tensor, state in zip(self._states.tensors, present, strict=True)}

    def length(self, states: States) -> int:
        return int(states[self._past].shape[2])

    def _row_by_row(self, ids: Ids, mask: Ids, states: States) -> tuple[Array, States]:
        """Compute every row in a call of its own, see BATCHED_APPEND."""
        rows = [
            self.step(ids[i : i + 1], mask[i : i + 1], {name: state[i : i + 1] for name, state in states.items()})
            for i in range(len(ids))
        ]
        return np.concatenate([logits for logits, _ in rows]), {
            name: np.concatenate([new[name] for _, new in rows]) for name in states
        }

    @cached_property
    def _observed(self) -> Any:
        """The InferenceSession whose outputs include the probes; it is opened at the first call of ``observe``."""
        return self._open(observed=True)

    def observe(self, ids: Ids, mask: Ids, states: States) -> tuple[Array, States, dict[str, Array]]:
        check_call(ids, mask, self.length(states), vocab_size=self._config.vocab_size)
        self._home.check()
        names = [output.name for output in self._observed.get_outputs()]
        values = self._run(self._observed, names, {INPUT_IDS: ids, ATTENTION_MASK: mask, **states, **self._every})
        found = dict(zip(names, values, strict=True))
        probes = {
            probe: part
            for name, value in found.items()
            if name.startswith(PREFIX)
            for probe, part in probes_in(name, value.astype(np.float32).reshape(*ids.shape, -1)).items()
        }
        after = {tensor.past: found[tensor.present] for tensor in self._states.tensors}
        return found[LOGITS], after, probes

    def start(self, batch: int, capacity: int) -> RestorableSession:
        self._home.check()
        if not self._variant.bound:
            return SteppedSession(self, batch)
        return BoundSession(self._graph(), batch, capacity)

    def rows(self, most: int) -> Rows | None:
        self._home.check()
        if self._library is None or self._device != "cpu":
            return None  # the order in which onnxruntime's own kernels add depends on the number of rows
        return BoundRows(self._graph(), most, self._config.max_position_embeddings)

    def _graph(self) -> BoundGraph:
        return BoundGraph(
            self._session,
            self._state_layout,
            self._states,
            self._config.vocab_size,
            self._batched_append,
            device=self._device,
            longest_call=self._longest_call,
            fixed_decode=self._options.captured_decode,
            asks_for_logits=self._asks,
        )

    def snapshot(self, states: States) -> dict[str, Array]:
        return {t.key: self._state_layout.canonical(t.kind, states[t.past]) for t in self._states.tensors}

    def restored(self, saved: SavedStates, batch: int) -> States:
        return {
            t.past: self._state_layout.stored(t.kind, np.repeat(saved.arrays[t.key], batch, axis=0))
            for t in self._states.tensors
        }

    def stored_weights(self) -> StoredWeights:
        graph = self._layout.graph_of(self._artifact)
        return StoredWeights(self._artifact, graph, _key, read_stored=self._variant.read_stored)


def _key(name: str) -> str | None:
    """Return the key by which ``read_stored`` looks an initializer up, and None for one that it does not read."""
    return name.removesuffix(ROWS) if name.startswith(ORDER) or name.endswith(STORED_SUFFIXES) else None


def _library(artifact: Artifact, kernels: Kernels) -> tuple[Path | None, str]:
    """Return the library of our own kernels, where the artifact has a graph for them, or why they cannot be used.

    Raises:
        H1ExportError: ``kernels`` is "native", and the artifact has no graph for them, or they do not compile.
    """
    if NATIVE_MODEL not in artifact.manifest.files:
        if kernels == "native":
            raise H1ExportError(artifact.folder, f"has no {NATIVE_MODEL}", "leave out --kernels native")
        return None, ""
    if kernels == "stock":
        return None, ""
    try:
        return native_library.library(), ""
    except H1ExportError as error:
        if kernels == "native":
            raise
        return None, f"runs on onnxruntime's own kernels, slower than h1export's: {error}"
