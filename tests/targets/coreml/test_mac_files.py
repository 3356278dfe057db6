"""The files for the Mac, run here against a toy language model that stands in for Core ML."""

from __future__ import annotations

import importlib.util
import io
import json
import platform
import re
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from h1export.errors import H1ExportError
from h1export.report.report import Report
from h1export.targets.coreml.mac import readme
from h1export.targets.coreml.mac.golden import TOLERANCE, golden, lengths, pack, places
from h1export.targets.coreml.mac.verify_on_mac import UNITS, Settings

VOCAB = 11
WIDTH = 6
CONTEXT = 40
CHUNK = 8
STEPS = 5
STATE = ("past_key_values_0_recurrent_state", "past_key_values_0_key")
RANDOM = np.random.default_rng(5)
TABLE, MIX, HEAD = (
    RANDOM.standard_normal(shape).astype(np.float32) for shape in ((VOCAB, WIDTH), (WIDTH, WIDTH), (2 * WIDTH, VOCAB))
)
TEXT = RANDOM.integers(1, VOCAB, CONTEXT + 1).astype(np.int64)


def advance(states: list[np.ndarray], token: int, position: int) -> np.ndarray:
    """One token through the toy: logits [VOCAB]; ``states`` change in place. Order, position and every token so far count."""
    states[0][:] = np.tanh(TABLE[token] + MIX @ states[0] + np.sin(position / 3))
    states[1][:] = 0.9 * states[1] + states[0]
    return np.asarray(np.concatenate(states) @ HEAD, np.float32)


def zeros() -> list[np.ndarray]:
    return [np.zeros(WIDTH, np.float32), np.zeros(WIDTH, np.float32)]


@dataclass
class ToyFunction:
    """The toy as the script sees a function of the package: it insists on every rule of README.md."""

    name: str
    settings: Settings
    unit: str = "CPU_ONLY"
    change: Callable[[np.ndarray], np.ndarray] = lambda logits: logits
    refuses: bool = False
    inputs: dict[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.width = self.settings.chunk if self.name == "prefill" else 1
        names = ["position", "n_valid"] if self.name == "prefill" else ["position"]
        states = STATE if self.settings.state_io else ()
        self.inputs = {"input_ids": (1, self.width), **dict.fromkeys(names, (1,)), **dict.fromkeys(states, (1, WIDTH))}

    def make_state(self) -> dict[str, Any]:
        return {"values": zeros(), "count": 0, "made by": self.name}

    def predict(self, feeds: Mapping[str, Any], state: Any = None) -> Mapping[str, Any]:
        assert {name: value.shape for name, value in feeds.items()} == self.inputs
        assert all(feeds[name].dtype == np.int32 for name in feeds if name not in STATE)
        assert (state is None) == self.settings.state_io
        ids = feeds["input_ids"][0]
        position = int(feeds["position"][0])
        count = int(feeds["n_valid"][0]) if self.width > 1 else 1
        assert 1 <= count <= self.width
        assert position + self.width <= self.settings.max_context, "out of room"
        assert not ids[count:].any()
        if self.refuses and state is not None and state["made by"] != self.name:
            raise RuntimeError("another function's state")
        values = [feeds[name][0].copy() for name in STATE] if state is None else state["values"]
        if state is not None:
            assert position <= state["count"], "tokens are missing before this call"
            state["count"] = position + count
        rows = [self.change(advance(values, int(token), position + k)) for k, token in enumerate(ids[:count])]
        logits = np.stack(
            [rows[-1]] if self.settings.last_logits else rows + [np.full(VOCAB, np.nan)] * (self.width - count)
        )[None]
        present = {
            name.replace("past_key_values", "present"): value[None] for name, value in zip(STATE, values, strict=True)
        }
        return {"logits": logits.astype(np.float16), **(present if state is None else {})}


def greedy(prompt: list[int], steps: int) -> list[int]:
    """The toy's own continuation, in fp16 as its functions round it."""
    states = zeros()
    tokens = list(prompt)
    for position in range(len(prompt) + steps - 1):
        logits = advance(states, tokens[position], position).astype(np.float16)
        if position >= len(prompt) - 1:
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


SETTINGS = Settings(CONTEXT, CHUNK)
VARIANTS = {
    "states": SETTINGS,
    "state io": replace(SETTINGS, state_io=True),
    "last logits": replace(SETTINGS, last_logits=True),
    "both": replace(SETTINGS, state_io=True, last_logits=True),
    "one chunk": replace(SETTINGS, chunk=CONTEXT - 1),
}


def truth() -> np.ndarray:
    """The toy's logits after each token of TEXT."""
    states = zeros()
    return np.stack([advance(states, int(token), place) for place, token in enumerate(TEXT)])


def data(settings: Settings = SETTINGS, prompts: Sequence[int] | None = None, steps: int = STEPS) -> bytes:
    found = lengths(settings.chunk, settings.max_context, len(TEXT), steps=steps) if prompts is None else prompts
    positions = [place for place in places(found, settings.chunk, steps) if place < len(TEXT)] if found else []
    return golden(TEXT, truth()[positions], found, positions=positions, steps=steps)


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """artifact(settings, **faults by unit) -> the script of a written folder, its door to Core ML replaced by toys."""

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
    """Every way of cutting, with states in either form: the toy refuses a call that breaks a rule."""
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
    assert all("took the prompt in itself: another function's state" in note for note in notes)


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
    """Report.from_json reads it, and to_json writes the same bytes, verdicts included."""
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
    assert "prefill takes input_ids (1, 8), and mac.json says chunks of 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("system", "version", "said"), [("Linux", "", "this is Linux"), ("Darwin", "14.7.1", "this is macOS 14.7.1")]
)
def test_a_system_without_core_ml(
    system: str,
    version: str,
    said: str,
    artifact: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = artifact(opened=False)
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "mac_ver", lambda: (version, ("", "", ""), ""))
    assert script.main([]) == 2
    assert f"{said}, and Core ML runs this package on macOS 15 or later" in capsys.readouterr().err


def fake_coremltools(settings: Settings) -> ModuleType:
    """As much of coremltools 9 as the scripts use, over the toy."""

    class MLModel(ToyFunction):
        def __init__(self, path: str, function_name: str, compute_units: str) -> None:
            assert path.endswith("model.mlpackage")
            super().__init__(function_name, settings, compute_units)

        def get_spec(self) -> Any:
            shapes = [
                (n, SimpleNamespace(multiArrayType=SimpleNamespace(shape=list(shape))))
                for n, shape in self.inputs.items()
            ]
            described = SimpleNamespace(
                name=self.name, input=[SimpleNamespace(name=n, type=kind) for n, kind in shapes]
            )
            return SimpleNamespace(description=SimpleNamespace(functions=[described], input=[]))

    class Units(dict[str, str]):
        __getattr__ = dict.__getitem__

    module: Any = ModuleType("coremltools")
    module.__version__ = "9.0"
    module.models = SimpleNamespace(MLModel=MLModel)
    module.ComputeUnit = Units({unit: unit for unit in UNITS})
    return module  # type: ignore[no-any-return]


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


def test_golden_arrays() -> None:
    """See the table of golden.py."""
    found = np.load(io.BytesIO(data(prompts=[1, CHUNK + 1, 30])), allow_pickle=False)
    assert (found["format"], found["tolerance"], found["steps"]) == (1, TOLERANCE, STEPS)
    assert found["prompts"].tolist() == [1, CHUNK + 1, 30]
    np.testing.assert_array_equal(found["ids"], TEXT)
    wanted = [*range(STEPS + 1), *range(CHUNK - 1, CHUNK + STEPS + 1), *range(29, 30 + STEPS)]
    assert found["positions"].tolist() == sorted(set(wanted))
    np.testing.assert_array_equal(found["logits"], truth()[found["positions"]].astype(np.float16))
    assert found["ids"].dtype == found["prompts"].dtype == found["positions"].dtype == np.int32


def test_golden_bytes_know_neither_time_nor_system(monkeypatch: pytest.MonkeyPatch) -> None:
    first = data()
    monkeypatch.setattr("time.time", lambda: 0.0)
    monkeypatch.setattr(sys, "platform", "win32")
    assert data() == first
    assert {entry.date_time for entry in zipfile.ZipFile(io.BytesIO(first)).infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize(
    "wrong", [{"prompts": []}, {"prompts": [0]}, {"prompts": [len(TEXT) - STEPS + 1]}, {"steps": 0}], ids=str
)
def test_golden_cases_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(H1ExportError, match=r"golden cases: prompts of .* give at least one length"):
        data(**wrong)
