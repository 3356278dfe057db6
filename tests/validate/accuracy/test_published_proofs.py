"""A checkpoint whose weights somebody published results for gets a row of its own; a stand-in takes its place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.store import weight_files
from h1export.commands.load import load_runner
from h1export.commands.validate import validate_artifact
from h1export.report.checks import CheckKind
from h1export.report.report import Verdict
from h1export.validate.accuracy import published_proofs
from h1export.validate.accuracy.published_proofs import proofs, proofs_of, published_rows
from h1export.validate.accuracy.reference import Reference

pytestmark = pytest.mark.ort

PROMPT = [3, 1, 4, 1, 5]
EXACT = {"source.logits": 5e-5}


@pytest.fixture(scope="module")
def reference(make_checkpoint: Callable[..., Path]) -> Reference:
    return Reference(make_checkpoint())


@pytest.fixture(scope="module")
def proof(make_checkpoint: Callable[..., Path], reference: Reference) -> dict[str, Any]:
    """What somebody would have published about the plain random model."""
    file = make_checkpoint() / "model.safetensors"
    ids = list(PROMPT)
    for _ in range(6):
        ids.append(int(reference.full(np.array(ids))[0][-1].argmax()))
    last = reference.full(np.array(PROMPT))[0][-1].astype(float)
    top = [int(token) for token in np.argsort(-last)[:10]]
    return {
        "model": "stand-in",
        "revision": "0123456789",
        "origin": "a test",
        "weights": [{"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}],
        "input_ids": PROMPT,
        "top_ids": top,
        "top_logits": [float(last[token]).hex() for token in top],
        "summary": {"max": float(last.max()).hex(), "min": float(last.min()).hex()},
        "generated": ids[len(PROMPT) :],
    }


def rows(
    proof: dict[str, Any], checkpoint: Path, artifact: Artifact, reference: Reference, folder: Path, **tolerances: float
) -> list[Any]:
    (folder / "proof.json").write_text(json.dumps(proof), encoding="utf-8")
    runner = load_runner(artifact)
    weights = weight_files(checkpoint, artifact.config)
    return published_rows(runner, reference, weights, tolerances=tolerances or EXACT, folder=folder)


def test_a_right_artifact_passes(
    proof: dict[str, Any],
    make_checkpoint: Callable[..., Path],
    build: Callable[..., Artifact],
    reference: Reference,
    tmp_path: Path,
) -> None:
    (row,) = rows(proof, make_checkpoint(), build(make_checkpoint()), reference, tmp_path)
    assert row.verdict is Verdict.PASS
    assert row.kind is CheckKind.PUBLISHED
    assert max(row.figures.values()) < 1e-5
    assert "stand-in at 01234567" in row.note


def planted(kind: str, proof: dict[str, Any]) -> dict[str, Any]:
    changed = json.loads(json.dumps(proof))
    span = float.fromhex(proof["summary"]["max"]) - float.fromhex(proof["summary"]["min"])
    if kind == "a logit":
        changed["top_logits"][7] = (float.fromhex(proof["top_logits"][7]) + 0.002 * span).hex()
    elif kind == "the extent":
        changed["summary"]["min"] = (float.fromhex(proof["summary"]["min"]) * 1.01).hex()
    elif kind == "two ids exchanged":
        changed["top_ids"][0], changed["top_ids"][9] = changed["top_ids"][9], changed["top_ids"][0]
    else:
        changed["generated"][-1] = (changed["generated"][-1] + 1) % 259
    return changed


@pytest.mark.parametrize("kind", ["a logit", "the extent", "two ids exchanged", "the last token"])
def test_planted_faults_fail(
    kind: str,
    proof: dict[str, Any],
    make_checkpoint: Callable[..., Path],
    build: Callable[..., Artifact],
    reference: Reference,
    tmp_path: Path,
) -> None:
    (row,) = rows(planted(kind, proof), make_checkpoint(), build(make_checkpoint()), reference, tmp_path)
    assert row.verdict is Verdict.FAIL


def test_a_wrong_artifact_fails_and_the_reference_does_not(
    proof: dict[str, Any],
    make_checkpoint: Callable[..., Path],
    build: Callable[..., Artifact],
    reference: Reference,
    tmp_path: Path,
) -> None:
    """The artifact is of another key multiplier."""
    other = build(make_checkpoint(key_multiplier=0.5))
    (row,) = rows(proof, make_checkpoint(), other, reference, tmp_path)
    assert row.verdict is Verdict.FAIL
    assert row.keeps("reference_logits")
    assert not row.keeps("logits")


def test_integers_are_shown_and_only_the_reference_is_judged(
    proof: dict[str, Any],
    make_checkpoint: Callable[..., Path],
    build: Callable[..., Artifact],
    reference: Reference,
    tmp_path: Path,
) -> None:
    (row,) = rows(proof, make_checkpoint(), build(make_checkpoint(), "int4"), reference, tmp_path, other=1.0)
    assert row.verdict is Verdict.PASS
    assert row.figures["logits"] > 1e-3


def test_other_weights_have_no_row(proof: dict[str, Any], make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Neither another file of the same size nor one that has one bit more."""
    (tmp_path / "proof.json").write_text(json.dumps(proof), encoding="utf-8")
    known = proofs(tmp_path)
    whole = (make_checkpoint() / "model.safetensors").read_bytes()
    for name, content in {"same": whole, "bit": whole[:-1] + bytes([whole[-1] ^ 1]), "longer": whole + b"\0"}.items():
        file = tmp_path / name
        file.write_bytes(content)
        assert len(proofs_of([file], known)) == (name == "same")


def test_validate_adds_the_row(
    proof: dict[str, Any],
    make_checkpoint: Callable[..., Path],
    build: Callable[..., Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "proof.json").write_text(json.dumps(proof), encoding="utf-8")
    known = proofs(tmp_path)
    monkeypatch.setattr(published_proofs, "proofs", lambda folder=None: known)
    artifact = build(make_checkpoint())
    report = validate_artifact(artifact.folder, make_checkpoint(), {}, latency_pairs=0)
    (row,) = (row for row in report.rows if row.kind is CheckKind.PUBLISHED)
    assert row.verdict is Verdict.PASS
    assert report.passed


def test_the_proofs_that_ship() -> None:
    (base,) = proofs()
    assert base.model == "tiiuae/Falcon-H1-0.5B-Base"
    assert base.ids.tolist() == [10528, 4498, 774, 1404]
    assert base.generated[0] == base.top_ids[0] == 535
    assert base.extent[0] == base.top_logits[0] == pytest.approx(-1.0707772)
    assert len(base.generated) == 20
    assert {size for size, _ in base.weights} == {1042886408}
