"""Compares an artifact of a published checkpoint with logits and tokens that another project computed from it.

A proof is a file in ``published/``. It belongs to weights, not to names: to files of certain sizes and sha256. Its
logits follow a prompt of token ids, and its tokens were generated greedily after the same prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np

from h1export.model.falcon_h1.states import Array, Ids
from h1export.report.checks import CheckKind, Comparison
from h1export.report.report import Row
from h1export.runtime.runner import Runner
from h1export.validate.accuracy.reference import Reference

# Of the range of the published logits: two float32 programs that add up in other orders, on a model of 36 layers.
REFERENCE_TOLERANCE = 1e-3
LOGITS = "logits"
SOURCE_LOGITS = f"{Comparison.SOURCE}.{LOGITS}"
TOKEN_GAP = "token_gap"
BLOCK = 1 << 24


@dataclass(frozen=True)
class Proof:
    """What another project computed from published weights.

    Attributes:
        model: the published name.
        revision: the commit of the published repository.
        origin: who computed it.
        weights: (bytes, sha256) of every file of weights.
        ids: the prompt, int64 [tokens].
        top_ids: the ids with the largest logits after the prompt.
        top_logits: their logits, float64 [top].
        extent: the largest and the smallest of all logits after the prompt.
        generated: the tokens that follow the prompt greedily.
    """

    model: str
    revision: str
    origin: str
    weights: frozenset[tuple[int, str]]
    ids: Ids
    top_ids: tuple[int, ...]
    top_logits: Array
    extent: tuple[float, float]
    generated: tuple[int, ...]

    @classmethod
    def read(cls, text: str) -> Proof:
        """Return the proof in the text of a file; its logits are hexadecimal floats."""
        found: Mapping[str, Any] = json.loads(text)
        return cls(
            model=found["model"],
            revision=found["revision"],
            origin=found["origin"],
            weights=frozenset((file["bytes"], file["sha256"]) for file in found["weights"]),
            ids=np.array(found["input_ids"], np.int64),
            top_ids=tuple(found["top_ids"]),
            top_logits=np.array([float.fromhex(value) for value in found["top_logits"]]),
            extent=(float.fromhex(found["summary"]["max"]), float.fromhex(found["summary"]["min"])),
            generated=tuple(found["generated"]),
        )

    @property
    def span(self) -> float:
        """The range of the published logits."""
        return self.extent[0] - self.extent[1]

    def figures(self, logits: Array) -> tuple[float, float]:
        """Return how far ``logits`` are from the proof, as shares of the range of its logits.

        The first is the largest error of the published logits and of the extent. The second says by how much a
        published token is below the best one, at the worst token; it is 0 where every token is chosen again.

        Args:
            logits: float32 [len(generated), vocab], after the prompt and after every token but the last.
        """
        last = logits[0].astype(np.float64)
        found = np.concatenate([last[list(self.top_ids)], [last.max(), last.min()]])
        error = np.abs(found - np.concatenate([self.top_logits, self.extent])).max()
        gaps = [row.max() - row[token] for row, token in zip(logits, self.generated, strict=True)]
        return float(error) / self.span, float(max(gaps)) / self.span


def proofs(folder: Traversable | None = None) -> list[Proof]:
    """Return the proofs in ``folder``; None means those that ship with h1export."""
    place = files("h1export.validate.accuracy") / "published" if folder is None else folder
    texts = {file.name: file.read_text(encoding="utf-8") for file in place.iterdir() if file.name.endswith(".json")}
    return [Proof.read(texts[name]) for name in sorted(texts)]


def proofs_of(weights: Sequence[Path], known: Sequence[Proof]) -> list[Proof]:
    """Return the proofs of a checkpoint with these files; they are hashed only where their sizes are published."""
    sizes = sorted(file.stat().st_size for file in weights)
    candidates = [proof for proof in known if sorted(size for size, _ in proof.weights) == sizes]
    if not candidates:
        return []
    found = frozenset((file.stat().st_size, _sha256(file)) for file in weights)
    return [proof for proof in candidates if proof.weights == found]


def published_rows(
    runner: Runner[Any],
    reference: Reference,
    weights: Sequence[Path],
    *,
    tolerances: Mapping[str, float],
    folder: Traversable | None = None,
) -> list[Row]:
    """Return a row for every proof of a checkpoint whose files are ``weights``; none for other checkpoints.

    The reference, which must hold the checkpoint's weights, is judged always, and the artifact where its logits have a
    tolerance, ``source.logits``: that of an artifact with integers has none.
    """
    return [_row(proof, runner, reference, tolerances=tolerances) for proof in proofs_of(weights, proofs(folder))]


def _row(proof: Proof, runner: Runner[Any], reference: Reference, *, tolerances: Mapping[str, float]) -> Row:
    text = np.concatenate([proof.ids, np.array(proof.generated[:-1], np.int64)])
    expected = reference.full(text)[0][len(proof.ids) - 1 :]
    error, gap = proof.figures(_stepped(runner, text, len(proof.ids)))
    own_error, own_gap = proof.figures(expected)
    figures = {LOGITS: error, TOKEN_GAP: gap, f"reference_{LOGITS}": own_error, f"reference_{TOKEN_GAP}": own_gap}
    judged = {f"reference_{LOGITS}": REFERENCE_TOLERANCE, f"reference_{TOKEN_GAP}": REFERENCE_TOLERANCE}
    if SOURCE_LOGITS in tolerances:
        tolerance = max(tolerances[SOURCE_LOGITS], REFERENCE_TOLERANCE)
        judged |= {LOGITS: tolerance, TOKEN_GAP: tolerance}
    note = f"{proof.model} at {proof.revision[:8]}, by {proof.origin}: {len(proof.generated)} tokens"
    return Row(CheckKind.PUBLISHED, Comparison.GOLDEN, figures=figures, tolerances=judged, note=note)


def _stepped(runner: Runner[Any], ids: Ids, prompt: int) -> Array:
    """Return the logits after the first ``prompt`` ids in one call, and after each further id."""
    states = runner.initial(1)
    rows = []
    for start, stop in [(0, prompt), *((place, place + 1) for place in range(prompt, len(ids)))]:
        mask = np.ones((1, stop), np.int64)
        logits, states = runner.step(ids[None, start:stop], mask, states)
        rows.append(logits[0, -1])
    return np.stack(rows)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
