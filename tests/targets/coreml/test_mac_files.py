"""verify_on_mac.py and the Python of README.md, run here with a toy language model that stands in for Core ML."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreml_toy import (
    CHUNK,
    CONTEXT,
    SETTINGS,
    STEPS,
    VARIANTS,
    VOCAB,
    ToyFunction,
    data,
    fake_coremltools,
    greedy,
)

from h1export.report.report import Report
from h1export.targets.coreml.mac import readme
from h1export.targets.coreml.mac.golden import pack
from h1export.targets.coreml.mac.verify_on_mac import UNITS, Settings


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """artifact(settings, faults by unit) -> the script of a written folder, with toys in the place of Core ML."""

    def make(
        settings: Settings = SETTINGS, faults: Mapping[str, Mapping[str, Any]] | None = None, opened: bool = True
    ) -> Any:
        (tmp_path / "out").mkdir(exist_ok=True)
        readme.write(tmp_path / "out", settings, data(settings))
        config = importlib.util.spec_from_file_location("verify_on_mac_copy", tmp_path / "out" / "verify_on_mac.py")
        assert config is not None
        assert config.loader is not None
        script = importlib.util.module_from_spec(config)
        monkeypatch.setitem(sys.modules, config.name, script)
        config.loader.exec_module(script)
        if opened:
            monkeypatch.setattr(
                script, "load", lambda _, name, unit: ToyFunction(name, settings, unit, **(faults or {}).get(unit, {}))
            )
        return script

    return make


def report(script: Any) -> Any:
    return json.loads((script.HERE / "report.json").read_text(encoding="utf-8"))


def verdicts(script: Any, unit: str) -> set[str]:
    return {row["verdict"] for row in report(script)["rows"] if row["device"] == unit and row["kind"] != "latency"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_right_model_passes(variant: str, artifact: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The toy refuses a call that breaks a rule, however the prompt is cut and whatever form the states have."""
    script = artifact(VARIANTS[variant])
    assert script.main(["--repeats", "1"]) == 0, capsys.readouterr().out
    assert [verdicts(script, unit) for unit in UNITS] == [{"pass"}, {"pass"}, {"info"}, {"info"}]
    worst = max(row["figures"]["logits"] for row in report(script)["rows"] if "logits" in row["figures"])
    assert worst < 1e-3  # rounded to fp16, no more
    speeds = [row["figures"] for row in report(script)["rows"] if row["kind"] == "latency"]
    assert len(speeds) == len(UNITS)
    assert all(speed["prefill_ms"] > 0 and speed["decode_ms"] > 0 for speed in speeds)
    assert "passed" in capsys.readouterr().out


WRONG = {
    "shifted": lambda logits: np.roll(logits, 1),
    "a little off": lambda logits: logits + 0.05 * np.ptp(logits) * (np.arange(VOCAB) == 3),
    "not a number": lambda logits: np.full_like(logits, np.nan),
    "infinite": lambda logits: np.where(np.arange(VOCAB) == 2, np.inf, logits),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("unit", ["CPU_ONLY", "CPU_AND_GPU"])
def test_wrong_logits_fail(
    unit: str, name: str, artifact: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    script = artifact(faults={unit: {"change": WRONG[name]}})
    assert script.main(["--repeats", "1"]) == 1
    assert verdicts(script, unit) == {"FAIL"}
    assert not report(script)["passed"]
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("name", WRONG)
def test_units_it_is_not_meant_for_are_for_information(name: str, artifact: Callable[..., Any]) -> None:
    script = artifact(faults={"CPU_AND_NE": {"change": WRONG[name]}})
    assert script.main(["--repeats", "1"]) == 0
    assert verdicts(script, "CPU_AND_NE") <= {"info", "n/a"}


def test_units_that_nobody_has_to_pass_judge_nothing(
    artifact: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert artifact().main(["--repeats", "1", "--units", "CPU_AND_NE"]) == 2
    assert "nothing was judged" in capsys.readouterr().err
    assert artifact(replace(SETTINGS, compute="CPU_AND_NE")).main(["--repeats", "1", "--units", "CPU_AND_NE"]) == 0


def test_a_refused_state_makes_decode_run_the_prompt(artifact: Callable[..., Any]) -> None:
    script = artifact(faults={unit: {"refuses": True} for unit in UNITS})
    assert script.main(["--repeats", "1"]) == 0
    notes = [row["note"] for row in report(script)["rows"] if row["comparison"] == "golden"]
    assert all("processed the prompt itself: another function's state" in note for note in notes)


def test_states_that_are_silently_not_shared_fail(
    artifact: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = artifact()
    predict = ToyFunction.predict

    def apart(function: ToyFunction, feeds: Mapping[str, Any], state: Any) -> Mapping[str, Any]:
        return predict(
            function,
            feeds,
            state.setdefault(function.name, function.make_state() | {"count": int(feeds["position"][0])}),
        )

    monkeypatch.setattr(ToyFunction, "predict", apart)
    assert script.main(["--repeats", "1"]) == 1


@pytest.mark.parametrize(("unit", "code"), [("CPU_ONLY", 1), ("CPU_AND_NE", 0)])
@pytest.mark.parametrize("when", ["load", "predict"])
def test_a_unit_that_raises(
    unit: str, code: int, when: str, artifact: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise RuntimeError("no such device")

    script = artifact(faults={unit: {"change": fail}})
    if when == "load":
        good = script.load
        monkeypatch.setattr(
            script, "load", lambda package, name, units: fail() if units == unit else good(package, name, units)
        )
    assert script.main(["--repeats", "1"]) == code
    assert verdicts(script, unit) == {"FAIL" if code else "n/a"}
    assert "no such device" in (script.HERE / "report.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("variant", ["good", "wrong"])
def test_the_report_is_one_of_h1exports(variant: str, artifact: Callable[..., Any]) -> None:
    """h1export's report classes read it and write it again with the same verdicts, byte for byte."""
    faults = (
        {"CPU_ONLY": {"change": WRONG["not a number"]}, "ALL": {"change": WRONG["infinite"]}}
        if variant == "wrong"
        else {}
    )
    script = artifact(faults=faults)
    (script.HERE / "manifest.json").write_text(
        '{"target": "coreml", "scheme": {"quant": "int4"}, "files": {}}', encoding="utf-8"
    )
    assert script.main(["--repeats", "1"]) == (variant == "wrong")
    text = (script.HERE / "report.json").read_text(encoding="utf-8")
    theirs = Report.from_json(text, script.HERE)
    assert theirs.to_json() == text
    assert theirs.passed is (variant == "good")
    assert theirs.subject["target"] == "coreml"


def of_another_format(path: Path) -> None:
    with np.load(path) as archive:
        path.write_bytes(pack({**archive, "format": np.array(99)}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "golden.npz gone": lambda out: (out / "golden.npz").unlink(),
    "golden.npz cut": lambda out: (out / "golden.npz").write_bytes((out / "golden.npz").read_bytes()[:500]),
    "golden.npz empty": lambda out: (out / "golden.npz").write_bytes(b""),
    "golden.npz of another format": lambda out: of_another_format(out / "golden.npz"),
    "golden.npz too long": lambda out: (out / "golden.npz").write_bytes(data(SETTINGS, [CONTEXT - STEPS + 1])),
    "mac.json gone": lambda out: (out / "mac.json").unlink(),
    "mac.json of somebody else": lambda out: (out / "mac.json").write_text('{"a": 1}', encoding="utf-8"),
    "manifest.json broken": lambda out: (out / "manifest.json").write_text("[]", encoding="utf-8"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_run(damage: str, artifact: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    script = artifact()
    DAMAGES[damage](script.HERE)
    assert script.main([]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"verify_on_mac: {damage.split()[0]}")
    assert message.count("\n") == 1
    assert not (script.HERE / "report.json").exists()


def test_a_package_of_other_chunks_cannot_be_run(
    artifact: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    script = artifact()
    (script.HERE / "mac.json").write_text(json.dumps({"max_context": CONTEXT, "chunk": CHUNK + 1}), encoding="utf-8")
    assert script.main([]) == 2
    assert "prefill takes input_ids (1, 8), and mac.json has chunks of 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("system", "version", "message"), [("Linux", "", "this is Linux"), ("Darwin", "14.7.1", "this is macOS 14.7.1")]
)
def test_a_system_without_core_ml(
    system: str,
    version: str,
    message: str,
    artifact: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = artifact(opened=False)
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "mac_ver", lambda: (version, ("", "", ""), ""))
    assert script.main([]) == 2
    assert f"{message}, and Core ML runs this package on macOS 15 or later" in capsys.readouterr().err


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_door_to_core_ml(variant: str, artifact: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    script = artifact(VARIANTS[variant], opened=False)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.0", ("", "", ""), "arm64"))
    monkeypatch.setitem(sys.modules, "coremltools", None)
    assert script.main([]) == 2  # it is missing
    monkeypatch.setitem(sys.modules, "coremltools", fake_coremltools(VARIANTS[variant]))
    assert script.main(["--repeats", "1"]) == 0
    assert report(script)["environment"]["packages"]["coremltools"] == "9.0"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_readmes_python_generates(
    variant: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", fake_coremltools(VARIANTS[variant]))
    (code,) = re.findall(r"```python\n(.*?)```", readme.text(VARIANTS[variant]), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert [int(word) for word in capsys.readouterr().out.split()] == greedy([1, 2, 3], 20)
