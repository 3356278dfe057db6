"""The logits of an artifact beside those of PyTorch, for pytest_plugin.py: as `validate` does, one text at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.tokenizer import Tokenizer, load_tokenizer
from h1export.commands.load import check_source, load_runner
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array, Ids
from h1export.report.checks import Comparison
from h1export.runtime.runner import Inspectable
from h1export.validate.accuracy.logits import logit_figures, relative_error
from h1export.validate.accuracy.reference import Reference
from h1export.validate.accuracy.tolerances import tolerances_of


@dataclass(frozen=True)
class Tolerance:
    """How far logits may be from the truth, relative to its range, and the tolerance of `validate` that sets it."""

    value: float
    metric: str


class Exported:
    """An artifact as it ships.

    ``exact`` is the same in float32 arithmetic, where rounding cannot hide lowering errors.
    """

    def __init__(self, artifact: Artifact, float32: bool = False) -> None:
        self.artifact = artifact
        self._float32 = float32
        self.runner: Inspectable[Any] = load_runner(artifact, float32=float32)

    @classmethod
    def open(cls, folder: Path) -> Exported:
        """Open the artifact in ``folder``.

        Raises H1ExportError where a file or the runtime is missing, or a file has changed.
        """
        artifact = Artifact.open(folder)
        artifact.check_hashes()
        return cls(artifact)

    @cached_property
    def exact(self) -> Exported:
        return self if self.runner.provenance.float32 else Exported(self.artifact, float32=True)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.artifact.folder)

    def ids(self, text: str) -> Ids:
        """Return the token ids int64 [seq] of ``text``, with special tokens."""
        return np.array(self.tokenizer.encode(text).ids, np.int64)

    def logits(self, ids: Ids) -> Array:
        """Return logits float32 [seq, vocab] of ids int64 [seq], from empty states.

        They are [1, vocab] where the artifact gives those of the last position only.
        """
        logits, _ = self.runner.step(ids[None], np.ones((1, len(ids)), np.int64), self.runner.initial(1))
        found: Array = logits[0]
        return found

    @property
    def tolerance(self) -> Tolerance:
        """The default tolerance of `validate` for this artifact against its own weights."""
        shipped = self.runner.provenance
        exact = self.exact.runner.provenance
        found = tolerances_of(self.artifact.manifest, shipped.float32, exact.float32, chosen={})
        widest_first = (Comparison.DRIFT, Comparison.STORED, Comparison.SOURCE)
        metric = next(metric for comparison in widest_first if (metric := f"{comparison}.logits") in found)
        return Tolerance(found[metric], metric)


class Truth:
    """The model of transformers on ``checkpoint``; for quantised tensors it has what the artifact stores.

    Raises:
        H1ExportError: The artifact was not built from this checkpoint.
    """

    def __init__(self, checkpoint: Path, exported: Exported) -> None:
        check_source(exported.artifact, checkpoint)
        self._reference = Reference(checkpoint)
        self._reference.hold(exported.runner.stored_weights())

    def logits(self, ids: Ids) -> Array:
        """Return logits float32 [seq, vocab] of ids int64 [seq]."""
        return self._reference.full(ids)[0]


def difference(
    found: Array, truth: Array, tolerance: Tolerance, *, tokenizer: Tokenizer | None, ids: Ids | None
) -> str:
    """Return where and how far logits [seq, vocab] are from the truth; the text is empty within the tolerance.

    Raises:
        H1ExportError: The shapes cannot be compared.
    """
    if found.shape != truth.shape or (ids is not None and len(ids) != len(truth)):
        what = f"found {list(found.shape)}, truth {list(truth.shape)}" + ("" if ids is None else f", {len(ids)} ids")
        raise H1ExportError("logits", what, "give logits [seq, vocab] of the same ids")
    error = relative_error(found, truth)
    if error <= tolerance.value:  # NaN is not
        return ""
    span = float(np.ptp(truth)) or 1.0
    errors = np.nan_to_num(np.abs(found.astype(np.float64) - truth) / span, nan=np.inf)
    beyond = np.flatnonzero(errors.max(1) > tolerance.value)
    worst = int(errors.max(1).argmax())
    figures = logit_figures([(found, truth)])
    entry = _entry(errors[worst], found[worst], truth[worst], tokenizer=tokenizer)
    lines = [
        f"logits are {error:.3g} of the range {span:.4g} from the reference; "
        f"tolerance {tolerance.metric} is {tolerance.value:.3g}: FAIL",
        f"  beyond it: {len(beyond)} of {len(truth)} positions, from {_place(int(beyond[0]), tokenizer, ids)}",
        f"  worst: {_place(worst, tokenizer, ids)}, {entry}",
        f"  likeliest token the same at {figures['top1']:.1%} of positions, KL divergence {figures['kl']:.3g} nats",
    ]
    return "\n".join(lines)


def _place(position: int, tokenizer: Tokenizer | None, ids: Ids | None) -> str:
    return f"position {position}" + ("" if ids is None else f" after {_name(int(ids[position]), tokenizer)}")


def _entry(errors: Any, found: Array, truth: Array, *, tokenizer: Tokenizer | None) -> str:
    token = int(errors.argmax())
    return f"logit of {_name(token, tokenizer)}: {found[token]:.6g}, and the reference says {truth[token]:.6g}"


def _name(token: int, tokenizer: Tokenizer | None) -> str:
    text = "" if tokenizer is None else tokenizer.decode([token], skip_special_tokens=False)
    return f"token {token}" + (f" {text!r}" if text else "")
