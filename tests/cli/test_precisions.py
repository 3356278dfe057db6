"""Plans of precisions: measured, written, edited, given back, and in the manifest and the artifact."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.cli import run
from h1export.commands.build import build_artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.progress import SILENT
from h1export.quantize.budget import Sensitivity
from h1export.quantize.precision import INT8, Precision
from h1export.quantize.precision_plan import plan_text, read_measured, read_plan
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
    # steps: the most sensitive first, and what is left after each
    lines = [line for line in (tmp_path / "plan.yaml").read_text(encoding="utf-8").splitlines() if "above" in line]
    assert [line.split(":")[0].strip() for line in lines] == ["lm_head.weight", "a.b", "c"]
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["0.100000", "0.000000", "0.000000"]
    assert [re.search(r"int8: ([\d.]+) bits", line)[1] for line in lines] == ["5.750", "7.000", "8.250"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": {"kl": -1.0, "shape": [8, 64], "int8": false}}', "divergence of -1.0"),
        ('{"a": {"kl": NaN, "shape": [8, 64], "int8": false}}', "is not a file of sensitivities"),
        ('{"a": {"kl": "high", "shape": [8, 64], "int8": false}}', "is not a file of sensitivities"),
        ('{"a": {"kl": 1, "int8": false}}', "is not a file of sensitivities"),
        ('{"a": 0.1}', "is not a file of sensitivities"),
        ("[0.1]", "is not a file of sensitivities"),
        ("tensors: {}", "is not a file of sensitivities"),
    ],
)
def test_what_has_no_sensitivities(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "measured.json").write_text(content, encoding="utf-8")
    with pytest.raises(H1ExportError, match=message):
        read_measured(tmp_path / "measured.json")


def test_only_one_option_chooses_precisions(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(tiny), "--target", "ort", "--preset", "small"]
    assert run([*words, "--budget-bits", "5"]) == 2
    assert "--preset, --budget-bits: say the same thing twice; give one of them" in capfd.readouterr().err
    assert run([*words, "--quant", "int8"]) == 2
    assert "--preset: has rules for int4 builds, and this one is int8" in capfd.readouterr().err


@pytest.mark.ort
def test_a_plan_has_the_presets(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = FalconH1Config.load(tiny)
    names = [name for name, found in QuantScheme("int4").precisions(config).items() if found.bits == 4]
    found = {name: {"kl": 0.001, "shape": [8, 64], "int8": False, "bits": 4.5, "left": 0.1} for name in names}
    (tmp_path / "measured.json").write_text(json.dumps(found), encoding="utf-8")
    words = ["plan", str(tiny), "--target", "ort", "--method", "rtn", "--preset", "small", "--json"]
    assert run([*words, "--sensitivity", str(tmp_path / "measured.json")]) == 0
    (plan,) = json.loads(capfd.readouterr().out)
    expected = {preset["name"]: preset["expected"] for preset in plan["presets"]}
    assert expected["int4"] == pytest.approx(0.001 * len(names))
    assert expected["small"] == pytest.approx(0.001 * (len(names) - 2 * config.num_hidden_layers))
    raised = [name for name, words in plan["precisions"].items() if words.startswith("int8")]
    assert len(raised) == 2 * config.num_hidden_layers + 1


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
    printed = capfd.readouterr().out
    (tmp_path / "measured.json").write_text(printed, encoding="utf-8")
    measured = json.loads(printed)
    assert read_measured(tmp_path / "measured.json") == {name: tensor["kl"] for name, tensor in measured.items()}
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
@pytest.mark.parametrize(
    ("quant", "chosen"), [("none", "int4"), pytest.param("none", "int8", marks=pytest.mark.slow), ("int8", "int4")]
)
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
