"""`h1export gate` as CI meets it: a baseline, verdicts, exit codes, JUnit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from h1export.artifact.artifact import Artifact
from h1export.cli import run
from h1export.cli.junit import to_junit
from h1export.commands import gate
from h1export.host import cpu_kind
from h1export.report.checks import Phase
from h1export.report.report import Verdict
from h1export.runtime.runner import Runner
from h1export.validate.speed import regression
from h1export.validate.speed.gate_checks import Check, GateCheckKind
from h1export.validate.speed.gate_file import Baseline, Gate, read_baselines, read_gates, write_baselines
from h1export.validate.speed.regression import GateReport
from h1export.validate.speed.worker import Timing

Build = Callable[..., Artifact]
COUNTED = '[[gate]]\ntarget = "ort"\nquant = "int4"\n'
TIMED = COUNTED + "pairs = 12\ntiming = [{ decode = 0, slowdown = 50 }]\n"  # as much as no neighbour takes


@pytest.fixture
def built(make_checkpoint: Callable[..., Path], build: Build) -> tuple[str, str]:
    return str(build(make_checkpoint(), "int4").folder), str(make_checkpoint())


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    return tmp_path / "gates.toml"


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no runtime is that runs the artifact."""
    monkeypatch.setattr(gate, "load_runner", partial(load_emulated, gate.load_runner))


def load_emulated(load: Callable[..., Runner[Any]], *args: Any, **options: Any) -> Any:
    return SimpleNamespace(provenance=replace(load(*args, **options).provenance, emulated=True))


def baseline_of(gates: Path) -> Baseline:
    return read_baselines(gates.with_name("gates.baseline.json"))["ort int4"]


@pytest.mark.slow
@pytest.mark.ort
def test_a_baseline_is_kept_by_what_it_is_of(
    built: tuple[str, str], gates: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(regression, "PROCESSES", 1)
    gates.write_text(TIMED)
    words = ["gate", *built, "--gates", str(gates)]
    junit = gates.with_name("gate.xml")
    assert run(words) == 2
    assert "has no baseline for ort int4; run h1export gate with --write-baseline" in capfd.readouterr().err
    assert run([*words, "--write-baseline", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"baseline": str(gates.with_name("gates.baseline.json"))}
    found = baseline_of(gates)
    assert found.ratios[cpu_kind()]["decode at 0"].pairs == 12
    assert found.peak_bytes > sum(size for name, size in found.files.items() if name.endswith(".data"))

    assert run([*words, "--json", "--junit", str(junit)]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["verdict"] == "pass"
    names = [
        "nodes model.onnx",
        "nodes model.native.onnx",
        "file bytes",
        "bytes a step reads",
        "peak memory",
        "decode at 0",
    ]
    kinds = [check["kind"] for check in report["checks"]]
    assert kinds == ["nodes", "nodes", "file bytes", "step bytes", "peak memory", "timing"]
    assert report["checks"][-1]["timing"] == {"phase": "decode", "tokens": 0, "batch": 1}
    assert [case.get("name") for case in ElementTree.parse(junit).iter("testcase")] == names

    elsewhere = {"another kind": found.ratios[cpu_kind()]}
    write_baselines(
        gates.with_name("gates.baseline.json"), {"ort int4": replace(found, ratios=elsewhere, peak_bytes=0)}
    )
    assert run(words) == 3
    assert "the baseline is of another kind" in " ".join(capfd.readouterr().err.split())


@pytest.mark.ort
@pytest.mark.usefixtures("emulated")
def test_a_larger_artifact_fails(built: tuple[str, str], gates: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gates.write_text(COUNTED)
    words = ["gate", *built, "--gates", str(gates)]
    assert run([*words, "--write-baseline"]) == 0
    found = baseline_of(gates)
    nodes = {
        graph: {op: count - (op == "Mul") for op, count in counts.items()} for graph, counts in found.nodes.items()
    }
    write_baselines(gates.with_name("gates.baseline.json"), {"ort int4": replace(found, nodes=nodes)})
    capfd.readouterr()
    assert run([*words, "--json"]) == 1
    failed = [check for check in json.loads(capfd.readouterr().out)["checks"] if check["verdict"] == "FAIL"]
    assert [(check["kind"], check["file"]) for check in failed] == [
        ("nodes", "model.onnx"),
        ("nodes", "model.native.onnx"),
    ]
    assert all("Mul" in check["note"] for check in failed)


@pytest.mark.ort
@pytest.mark.slow
def test_a_gpu_is_timed_by_the_wall_clock_and_has_ratios_of_its_own(
    built: tuple[str, str], gates: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where an artifact runs on one; here it only says so."""
    monkeypatch.setattr(regression, "PROCESSES", 1)
    load = gate.load_runner
    monkeypatch.setattr(
        gate,
        "load_runner",
        lambda *a, **k: SimpleNamespace(provenance=replace(load(*a, **k).provenance, gpu="sm_89")),
    )
    words = ["gate", *built, "--gates", str(gates), "--write-baseline"]
    gates.write_text(TIMED)
    assert run(words) == 2
    assert 'clock = "cpu" does not count what sm_89 does; set clock = "wall"' in capfd.readouterr().err
    gates.write_text(TIMED.replace("pairs", 'clock = "wall"\npairs'))
    assert run(words) == 0
    assert list(baseline_of(gates).ratios) == [f"{cpu_kind()} sm_89"]


@pytest.mark.ort
def test_bad_input_is_one_line(
    built: tuple[str, str], tiny: Path, gates: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, checkpoint = built
    for text, model, message in (
        (COUNTED.replace("int4", "int8"), checkpoint, "has no gate for target ort, quant int4"),
        (TIMED, str(tiny), "was not built from"),
        (COUNTED + "x = 1", checkpoint, "unknown key at $.gate[0].x"),
    ):
        gates.write_text(text)
        assert run(["gate", out, model, "--gates", str(gates)]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert message in line


@pytest.mark.ort
@pytest.mark.usefixtures("emulated")
def test_another_build_has_no_baseline(
    built: tuple[str, str], build: Build, gates: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gates.write_text(COUNTED)
    assert run(["gate", *built, "--gates", str(gates), "--write-baseline"]) == 0
    other = build(Path(built[1]), "int4", accuracy_level=4)
    assert run(["gate", str(other.folder), built[1], "--gates", str(gates)]) == 2
    assert "of another model, or of other build options" in capfd.readouterr().err


@pytest.mark.ort
@pytest.mark.usefixtures("emulated")
def test_what_is_only_emulated_is_counted_and_not_timed(
    built: tuple[str, str], gates: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gates.write_text(TIMED)
    assert run(["gate", *built, "--gates", str(gates), "--write-baseline"]) == 0
    capfd.readouterr()
    assert run(["gate", *built, "--gates", str(gates), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["checks"][-1]["verdict"] == "n/a"


CHECKS = (
    Check(GateCheckKind.NODES, Verdict.PASS, file="a", figure=3, limit=3),
    Check(GateCheckKind.FILE_BYTES, Verdict.FAIL, figure=4_115_591, limit=4_115_590, note="a 2, was 1"),
    Check(
        GateCheckKind.TIMING,
        Verdict.INCONCLUSIVE,
        timing=Timing(Phase.DECODE, 0),
        figure=1.15,
        limit=1.16,
        low=1.1,
        high=1.2,
        note="about 300 pairs",
    ),
    Check(GateCheckKind.MEASUREMENTS, Verdict.NOT_APPLICABLE, note="emulated"),
)


def test_junit_has_a_case_for_every_check() -> None:
    suite = ElementTree.fromstring(to_junit(GateReport("out", Gate("ort", "int4"), {}, checks=CHECKS)))
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "4", "failures": "1", "errors": "1", "skipped": "1"}
    said = {case.get("name"): [(child.tag, child.get("message")) for child in case] for case in suite}
    assert said == {
        "nodes a": [],
        "file bytes": [("failure", "4115591, limit 4115590; a 2, was 1")],
        "decode at 0": [("error", "1.15, limit 1.16; about 300 pairs")],
        "memory and timings": [("skipped", "emulated")],
    }


def test_the_worst_verdict_is_the_reports() -> None:
    def verdict(*checks: Check) -> Verdict:
        return GateReport("out", Gate("ort", "int4"), {}, checks=checks).verdict

    assert (verdict(*CHECKS), verdict(CHECKS[0], CHECKS[2]), verdict(CHECKS[0], CHECKS[3])) == (
        Verdict.FAIL,
        Verdict.INCONCLUSIVE,
        Verdict.PASS,
    )


def test_the_projects_own_gates_are_read() -> None:
    (gate,), place = read_gates(Path(__file__).parents[2] / "gates.toml")
    (baseline,) = read_baselines(place).values()
    assert {limit.timing.key for limit in gate.timings} == {
        name for ratios in baseline.ratios.values() for name in ratios
    }
