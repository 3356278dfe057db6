"""gates.toml says what it means or is refused by name; a baseline comes back as it was written."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from h1export.errors import MOST_SHOWN, H1ExportError
from h1export.report.checks import Phase
from h1export.validate.speed.gate_file import (
    Baseline,
    Clock,
    Gate,
    Limit,
    Ratio,
    read_baselines,
    read_gates,
    write_baselines,
)
from h1export.validate.speed.statistics import Estimate
from h1export.validate.speed.worker import Timing

HEAD = '[[gate]]\ntarget = "ort"\nquant = "int4"\n'


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    return tmp_path / "gates.toml"


def test_defaults_are_those_of_the_dataclass(gates: Path) -> None:
    gates.write_text(HEAD)
    assert read_gates(gates) == ((Gate("ort", "int4"),), gates.parent / "gates.baseline.json")


def test_every_key(gates: Path) -> None:
    numbers = "threads = 2\npairs = 40\nbytes = 1.01\nstep_bytes = 1.02\nnodes = 1.03\nmemory = 1.5\n"
    timings = "[[gate.timing]]\ndecode = 512\nbatch = 4\nslowdown = 1.3\n[[gate.timing]]\nprefill = 128\n"
    gates.write_text(
        f'baseline = "../base.json"\n{HEAD}{numbers}{timings}\n{HEAD.replace("int4", "none")}clock = "wall"\n'
    )
    (first, second), place = read_gates(gates)
    limits = (Limit(Timing(Phase.DECODE, 512, 4), 1.3), Limit(Timing(Phase.PREFILL, 128)))
    assert first == Gate(
        "ort",
        "int4",
        limits,
        threads=2,
        clock=Clock.WALL,
        pairs=40,
        bytes=1.01,
        step_bytes=1.02,
        nodes=1.03,
        memory=1.5,
    )  # threads wait for each other
    assert {field.name for field in dataclasses.fields(Gate) if getattr(first, field.name) == field.default} == set()
    assert second == Gate("ort", "none", clock=Clock.WALL)
    assert place.resolve() == (gates.parent.parent / "base.json").resolve()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[gate]", "is not a file of gates"),
        ("gates = 1", "unknown key at $.gates"),
        (HEAD + "slowdwon = 1.2", "unknown key at $.gate[0].slowdwon"),
        (HEAD + "[[gate.timing]]\ndecode = 1\nlimit = 1.2", "unknown key at $.gate[0].timing[0].limit"),
        (HEAD + "[[gate.timing]]\nbatch = 1", "0 of decode and prefill"),
        (HEAD + "timing = [{ decode = 1, prefill = 1 }]", "2 of decode and prefill"),
        (HEAD + "timing = [{ prefill = 0 }]", ">= 1 - at `$.gate[0].timing[0].prefill`"),
        (HEAD + "timing = [{ decode = -1 }]", ">= 0 - at `$.gate[0].timing[0].decode`"),
        (HEAD + "timing = [{ decode = 1, slowdown = 1 }]", "> 1.0 - at `$.gate[0].timing[0].slowdown`"),
        (HEAD + "timing = [{ decode = 1, batch = 4611686018427387904 }]", "$.gate[0].timing[0].batch"),
        (HEAD + "timing = [3]", "got `int` - at `$.gate[0].timing[0]`"),
        (HEAD + 'memory = "much"', "Expected `float`, got `str` - at `$.gate[0].memory`"),
        (HEAD + "threads = true", "Expected `int`, got `bool` - at `$.gate[0].threads`"),
        (HEAD + "threads = 0", ">= 1 - at `$.gate[0].threads`"),
        (HEAD + f"threads = 0x{'f' * 8000}", "$.gate[0].threads"),  # more digits than Python prints
        (HEAD + "pairs = 3", ">= 12 - at `$.gate[0].pairs`"),
        (HEAD + "nodes = 0.9", ">= 1.0 - at `$.gate[0].nodes`"),
        (HEAD + "memory = nan", "$.gate[0].memory"),
        (HEAD + "memory = inf", "$.gate[0].memory"),
        (HEAD + "memory = 1979-05-27", "$.gate[0].memory"),
        (HEAD + "timing = [{ decode = 1, slowdown = nan }]", "$.gate[0].timing[0].slowdown"),
        (HEAD + 'clock = "sun"', "Invalid enum value - at `$.gate[0].clock`"),
        ('[[gate]]\ntarget = "ort"\nquant = "int5"', "Invalid enum value - at `$.gate[0].quant`"),
        ('[[gate]]\ntarget = "ort"', "missing required field `quant` - at `$.gate[0]`"),
        ('baseline = "a\\u0000b"', "$.baseline"),
        (HEAD + HEAD, "has two gates for ort int4"),
    ],
)
def test_what_is_wrong_is_named(gates: Path, text: str, message: str) -> None:
    gates.write_text(text)
    with pytest.raises(H1ExportError, match=re.escape(message)) as caught:
        read_gates(gates)
    assert len(str(caught.value)) <= MOST_SHOWN + len(str(gates))


def test_no_file(gates: Path) -> None:
    with pytest.raises(H1ExportError, match=r"cannot be read .*docs/gates.md"):
        read_gates(gates)


def test_a_baseline_comes_back_as_written(tmp_path: Path) -> None:
    ratios = {"x86_64 avx2": {"decode at 0": Ratio(Estimate(0.1, 0.09, 0.11), 66)}}
    found = {
        "ort int4": Baseline(
            "m",
            {"model.onnx": {"Add": 2}},
            {"model.onnx": 10},
            step_bytes={"decode at 0": 7},
            peak_bytes=99,
            ratios=ratios,
            spills={"decode sm_80": 0},
        )
    }
    place = tmp_path / "baseline.json"
    assert read_baselines(place) == {}
    write_baselines(place, found)
    assert read_baselines(place) == found
    assert [path.name for path in tmp_path.iterdir()] == [place.name]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 2, "gates": {}}', '{"format": 1, "gates": {"a": {}}}', '{"format": 1}']
)
def test_another_file_is_no_baseline(tmp_path: Path, text: str) -> None:
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(H1ExportError, match=r"is not a baseline .*--write-baseline"):
        read_baselines(tmp_path / "b.json")
