"""Plans of precisions: measured, written, edited, given back, and in the manifest and the artifact."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.cli import run
from h1export.commands.build import build_artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.progress import SILENT
from h1export.quantize.budget import Sensitivity
from h1export.quantize.precision import INT8, Precision
from h1export.quantize.precision_plan import plan_text, read_plan
from h1export.quantize.scheme import QuantScheme
from h1export.report.checks import CheckKind
from h1export.report.report import Report, Verdict
from h1export.validate.accuracy.run import ValidateOptions, validate

PROJECTION = "model.layers.0.self_attn.k_proj.weight"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    found = {
        name: Sensitivity((8, 64), Precision(4, 32), kl)
        for name, kl in (("a.b", 0.1), ("c", 1e-9), ("lm_head.weight", 0.5))
    }
    (tmp_path / "plan.yaml").write_text(plan_text(found, {"c": INT8}), encoding="utf-8")
    assert read_plan(tmp_path / "plan.yaml") == {"lm_head.weight": "int4", "a.b": "int4", "c": "int8"}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "tensors: 3",
        "tensors:\n  a: int5",
        "tensors:\n  a: [int4]",
        "weights:\n  a: int4",
        "tensors: {",
        "a\0b",
        "[tensors]",
    ],
)
def test_what_is_not_a_plan(content: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(H1ExportError, match=r"is not a plan of precisions(: byte 1 is NUL| .*; lines are)"):
        read_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    "line",
    [
        "model.layers.9.mamba.in_proj.weight: int8",
        "model.final_layernorm.weight: int8",
        "model.embed_tokens.weight: int4",
    ],
)
def test_tensors_without_a_choice_are_refused(line: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(f"tensors:\n  {line}\n", encoding="utf-8")
    with pytest.raises(H1ExportError, match="correct --precisions"):
        build_artifact(tiny, "ort", tmp_path / "out", scheme=QuantScheme(chosen=read_plan(tmp_path / "plan.yaml")))


@pytest.mark.ort
def test_a_plan_goes_into_the_artifact(
    spoken_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line of a plan within a budget is edited by hand: a projection that stays in floats is not fused."""
    plan = tmp_path / "plan.yaml"
    out = tmp_path / "out"
    few = [str(spoken_checkpoint), "--budget-bits", "5.5", "--out", str(plan), "--json"]
    assert run(["sensitivity", *few]) == 0
    measured = json.loads(capfd.readouterr().out)
    raised = {name for name, tensor in measured.items() if tensor["int8"]}
    assert 0 < len(raised) < len(measured)
    text = plan.read_text(encoding="utf-8")
    plan.write_text(
        "\n".join(f"  {PROJECTION}: none" if PROJECTION in line else line for line in text.splitlines()),
        encoding="utf-8",
    )
    words = [
        str(spoken_checkpoint),
        "--target",
        "ort",
        "--method",
        "rtn",
        "--accuracy-level",
        "0",
        "--precisions",
        str(plan),
        "--quiet",
    ]
    assert run(["build", *words, "--out", str(out)]) == 0
    artifact = Artifact.open(out)
    chosen = artifact.manifest.scheme["chosen"]
    assert chosen == read_plan(plan)
    stored = {
        part.tensor: (weight.bits, weight.group_size) for weight in artifact.manifest.weights for part in weight.parts
    }
    assert PROJECTION not in stored
    assert all(stored[name] == ((8, 0) if chosen[name] == "int8" else (4, 32)) for name in chosen if name != PROJECTION)
    runner = load_runner(artifact)
    report = validate(
        artifact, runner, runner, checkpoint=spoken_checkpoint, options=ValidateOptions(pairs=0), progress=SILENT
    )
    assert report.passed, report.to_json()
    assert np.isfinite(
        [row.figures["kl"] for row in report.rows if row.comparison == "stored" and row.compares_outputs]
    ).all()


@pytest.mark.ort
@pytest.mark.parametrize(("quant", "chosen"), [("none", "int4"), ("none", "int8"), ("int8", "int4")])
def test_single_tensors_are_judged_by_their_own_integers(quant: str, chosen: str, tiny: Path, tmp_path: Path) -> None:
    """Where the scheme itself has none, or longer ones."""
    plan = tmp_path / "plan.yaml"
    out = tmp_path / "out"
    plan.write_text(f"tensors:\n  {PROJECTION}: {chosen}\n", encoding="utf-8")
    words = [
        "build",
        "--target",
        "ort",
        "--quant",
        quant,
        "--method",
        "rtn",
        "--precisions",
        str(plan),
        "--out",
        str(out),
        "--quiet",
    ]
    assert run([*words, "--validate", "--latency-pairs", "0", "--prompts", "0", "--text-bytes", "500"]) == 0
    report = Report.from_json((out / "report.json").read_text(), out)
    (integers,) = [row for row in report.rows if row.kind is CheckKind.STORED_INTEGERS]
    assert integers.verdict is Verdict.PASS
    assert PROJECTION in integers.details


@pytest.mark.parametrize(
    "words", [["--budget-bits", "5", "--budget-kl", "0.1"], ["--budget-bits", "-1"], ["--precisions", "nowhere.yaml"]]
)
def test_contradictions(words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["build", "--target", "ort", *words, "--out", str(tmp_path / "out")]) == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())
