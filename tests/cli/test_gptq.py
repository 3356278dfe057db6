"""A prequantized checkpoint on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from gptq_files import Written

from h1export.cli import run
from h1export.commands.load import load_folder
from h1export.report.checks import CheckKind


@pytest.fixture(scope="module")
def folder(make_gptq: Callable[..., Written], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gptq(tmp_path_factory.mktemp("ready") / "model-gptq", act_order=True, sym=False).folder


CHOICES = (
    ["--quant", "int4"],
    ["--method", "gptq"],
    ["--budget-bits", "5"],
    ["--budget-kl", "0.1"],
    ["--calibration", "x.txt"],
    ["--device", "cpu"],
)


@pytest.mark.parametrize("given", CHOICES, ids=str)
def test_what_would_choose_integers_is_refused(
    given: list[str], folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", str(folder), "--target", "ort", "--out", str(tmp_path / "out"), *given]) == 2
    said = capfd.readouterr().err
    assert given[0] in said
    assert "quantised already" in said
    assert "unquantised checkpoint" in said
    assert not (tmp_path / "out").exists()


def test_inspect_tells_how_it_is_quantised(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["quantised"] == {"bits": 4, "group_size": 32, "sym": False, "zero_offset": 1, "tensors": 9}
    assert found["ignored_quantization_keys"] == ["damp_percent", "desc_act", "lm_head", "meta"]
    assert found["bytes_by_dtype"].keys() == {"F16", "F32", "I32"}


@pytest.mark.ort
def test_a_plan_tells_its_precisions(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.yaml").write_text("tensors:\n  lm_head.weight: int8\n", encoding="utf-8")
    assert run(["plan", str(folder), "--target", "ort", "--precisions", str(tmp_path / "plan.yaml"), "--json"]) == 0
    (found,) = json.loads(capfd.readouterr().out)
    assert found["precisions"]["model.layers.0.mamba.in_proj.weight"] == "int4, group size 32, zero points"
    assert found["precisions"]["lm_head.weight"] == "int8, a scale per row"
    assert found["precisions"]["model.embed_tokens.weight"] == "float32"


@pytest.mark.ort
def test_the_main_job(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["build", str(folder), "--target", "ort", "--validate", "--latency-pairs", "0", "--json"]) == 0
    (built,) = json.loads(capfd.readouterr().out)
    assert built["out"] == "model-gptq-ort-int4"
    (judged,) = [row for row in built["report"]["rows"] if row["kind"] == CheckKind.STORED_INTEGERS]
    assert judged["figures"]["steps"] == 0
    assert len(load_folder(built["out"]).stored_weights()) == 9
