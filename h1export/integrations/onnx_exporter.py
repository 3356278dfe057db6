"""A Runner over an export by transformers' own OnnxExporter, so that ``validate.accuracy.run.judge`` can judge it.

``OnnxExporter().export_for_generation(model, inputs, OnnxConfig(dynamic=True)).save_pretrained(folder)`` writes two
graphs: prefill, which starts from no tokens, and decode, which takes one token. Both take one row without pads. The
decode graph has to be dynamic, because the past grows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import INPUT_IDS, LOGITS, Array, Ids, StateKind, StateSpec, StateTensor
from h1export.runtime.runner import Limits, Provenance, check_call
from h1export.runtime.session import SteppedSession
from h1export.targets.onnx import sdk

PREFILL = "prefill.onnx"
DECODE = "decode.onnx"
KINDS = {
    StateKind.KEY: "keys",
    StateKind.VALUE: "values",
    StateKind.CONV: "conv_states.0",
    StateKind.RECURRENT: "recurrent_states.0",
}
SHORT = (
    "prefill leaves too short a convolution state after fewer tokens than the convolution has taps: "
    "they go through decode here"
)
States = dict[str, npt.NDArray[Any]]


class ExporterRunner:
    """A Runner over what OnnxExporter saved in ``folder``. Its states are arrays by the names of the exporter's cache.

    Raises:
        H1ExportError: onnxruntime cannot load the graphs.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        ort = sdk.onnxruntime()
        self._config = FalconH1Config.load(folder)
        self._states = StateSpec.of(self._config)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors also come as exceptions
        try:
            self._prefill, self._decode = (
                ort.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
                for name in (PREFILL, DECODE)
            )
        except Exception as error:  # onnxruntime's exception types share no base class
            raise H1ExportError(
                folder, f"onnxruntime cannot load {PREFILL} and {DECODE} ({error})", "export it again"
            ) from None
        self._kernels = f"onnxruntime {ort.__version__}"
        (length,) = [port.shape[1] for port in self._prefill.get_inputs() if port.name == INPUT_IDS]
        self._prompt_length = (
            length if isinstance(length, int) else None
        )  # of the traced prompt; None where it is dynamic

    @property
    def config(self) -> FalconH1Config:
        return self._config

    @property
    def limits(self) -> Limits:
        return Limits(max_batch=1)

    @property
    def provenance(self) -> Provenance:
        return Provenance(kernels=self._kernels)

    @property
    def notes(self) -> tuple[str, ...]:
        if self._prompt_length:
            return (f"prefill takes {self._prompt_length} tokens, no fewer and no more: others go through decode",)
        return (SHORT,)

    def initial(self, batch: int) -> States:
        zeros = self._states.zeros(batch)
        return {
            _name(t): _wider(zeros[t.key]) if t.kind is StateKind.CONV else zeros[t.key] for t in self._states.tensors
        }

    def step(self, ids: Ids, mask: Ids, states: States) -> tuple[Array, States]:
        past = self.length(states)
        check_call(ids, mask, past, vocab_size=self._config.vocab_size)
        if len(ids) > 1 or not mask.all():
            raise H1ExportError(
                "step", f"{len(ids)} rows, {int((mask == 0).sum())} pads", "its graphs take one row without pads"
            )
        if not past and (
            ids.shape[1] == self._prompt_length if self._prompt_length else ids.shape[1] >= self._config.mamba_d_conv
        ):
            return self._run(self._prefill, ids, 0, states={})
        rows = []
        for position in range(ids.shape[1]):
            logits, states = self._run(self._decode, ids[:, position : position + 1], past + position, states=states)
            rows.append(logits)
        return np.concatenate(rows, axis=1), states

    def _run(self, session: Any, ids: Ids, past: int, *, states: States) -> tuple[Array, States]:
        given = {INPUT_IDS: ids, "position_ids": np.arange(past, past + ids.shape[1])[None], **states}
        feeds = {port.name: given[port.name.removeprefix("input.")] for port in session.get_inputs()}
        names = [port.name for port in session.get_outputs()]
        found = {
            name.removeprefix("output."): array for name, array in zip(names, session.run(names, feeds), strict=True)
        }
        return found.pop(LOGITS), found

    def length(self, states: States) -> int:
        growing = next(tensor for tensor in self._states.tensors if tensor.kind.grows)
        return int(states[_name(growing)].shape[2])

    def start(self, batch: int, capacity: int) -> SteppedSession:
        return SteppedSession(self, batch)

    def snapshot(self, states: States) -> dict[str, Array]:
        arrays = {tensor: states[_name(tensor)] for tensor in self._states.tensors}
        return {t.key: array[..., 1:] if t.kind is StateKind.CONV else array for t, array in arrays.items()}


def _name(tensor: StateTensor) -> str:
    return f"cache.layers.{tensor.layer}.{KINDS[tensor.kind]}"


def _wider(state: Array) -> Array:
    """Return a convolution state with the additional input that transformers keeps."""
    return np.pad(state, ((0, 0), (0, 0), (1, 0)))
