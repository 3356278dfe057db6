"""What a plan says, against what a build then makes and needs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from h1export.checkpoint.store import WeightStore
from h1export.cli import run
from h1export.commands.plan import plan_build
from h1export.quantize.scheme import QuantScheme
from h1export.targets.onnxruntime.options import OrtOptions

pytestmark = pytest.mark.ort

MEMORY = 0.25  # of the measured peak
INTERVAL = 0.005  # seconds between looks at a process's memory


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_sizes_are_exact(quant: str, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["--target", "ort", "--quant", quant, "--method", "rtn", "--out", str(out)]
    assert run(["plan", *words, "--json"]) == 0
    (plan,) = json.loads(capfd.readouterr().out)
    assert not list(tmp_path.iterdir())
    assert run(["build", *words, "--quiet"]) == 0
    assert plan["files"] == {file.name: file.stat().st_size for file in out.iterdir()}
    assert plan["artifact_bytes"] == sum(plan["files"].values())
    assert plan["source_bytes"] > plan["artifact_bytes"] or quant == "none"


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq", "rtn+scales"])
def test_no_weight_is_read(method: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(WeightStore, "rows", read)
    plan = plan_build(
        tiny, "ort", tmp_path / "out", scheme=QuantScheme("int4", 32, method), options=OrtOptions(), contexts=(0, 100)
    )
    # keys and values of 4 layers, 2 heads of 64, 16 bits
    assert plan.state_bytes[100] - plan.state_bytes[0] == 100 * 2 * 4 * 2 * 64 * 2
    assert (plan.scratch_bytes > 0) == (method in ("gptq", "rtn+scales"))
    assert plan.precisions["lm_head.weight"] == "int4, group size 32"
    assert plan.precisions["model.embed_tokens.weight"] == "int8, a scale per row"
    assert plan.precisions["model.final_layernorm.weight"] == "float32"
    assert sum(plan.by_precision().values()) == len(plan.precisions)


@pytest.mark.slow
def test_peak_memory_is_near_the_measured_one(tiny: Path, tmp_path: Path) -> None:
    """Each in a process of its own, as a user runs them."""
    words = ["--target", "ort", "--method", "rtn", "--out", str(tmp_path / "out"), "--jobs", "2"]
    planned = json.loads(subprocess.run(command("plan", *words, "--json"), check=True, capture_output=True).stdout)[0][
        "peak_bytes"
    ]
    measured = peak_anonymous_bytes(command("build", *words, "--quiet"))
    assert planned == pytest.approx(measured, rel=MEMORY)


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", "from h1export.cli import main; main()", *words]


def peak_anonymous_bytes(words: list[str]) -> int:
    peak = 0
    with subprocess.Popen(words) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            peak = max(
                peak, *(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")), 0
            )
            time.sleep(INTERVAL)
    assert process.returncode == 0
    return peak


def test_a_checkpoint_that_cannot_be_built_cannot_be_planned(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(tmp_path), "--target", "ort"]) == 2
    assert "config.json" in capfd.readouterr().err


def test_the_table_says_what_matters(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--target", "ort", "--context", "4096"]) == 0
    err = capfd.readouterr().err
    for words in ("artifact", "disk", "enough", "peak memory", "states at 4096 tokens", "int4, group size 32"):
        assert words in err
