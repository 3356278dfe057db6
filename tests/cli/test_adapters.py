"""Every command that compares an artifact with its checkpoint takes the adapters that it was built with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_files import write_adapter

from h1export.cli import run
from h1export.commands import bench, gate
from h1export.commands.load import load_folder
from h1export.commands.sensitivity import measure_sensitivity
from h1export.commands.worker_models import reference_model
from h1export.errors import H1ExportError
from h1export.quantize.calibration import Calibration
from h1export.quantize.scheme import QuantScheme
from h1export.validate.accuracy.logits import relative_error
from h1export.validate.speed.bench import BenchOptions, Candidate
from h1export.validate.speed.gate_file import Baseline, Gate
from h1export.validate.speed.regression import Makers

EXACT = 1e-5  # of the range: float32 against float32
IDS = np.arange(3, 20)
GATE = """[[gate]]
target = "ort"
quant = "none"
pairs = 12
timing = [{ decode = 0, slowdown = 50 }]
"""


@pytest.fixture(scope="module")
def adapter(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(make_checkpoint(), tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def merged(adapter: Path, make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with the adapter merged."""
    out = tmp_path_factory.mktemp("merged") / "out"
    given = ["--target", "ort", "--quant", "none", "--adapter", str(adapter), "--out", str(out)]
    assert run(["build", str(make_checkpoint()), *given, "--quiet"]) == 0
    return out


def refused_then_taken(given: list[str], adapter: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(given) == 2
    said = capfd.readouterr().err
    assert "1 adapters merged" in said
    assert "--adapter" in said
    assert run([*given, "--adapter", str(adapter)]) == 0


@pytest.mark.ort
def test_validate(
    adapter: Path, merged: Path, make_checkpoint: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    refused_then_taken(["validate", str(merged), str(make_checkpoint()), "--quick", "--quiet"], adapter, capfd)


@pytest.mark.ort
def test_gate(
    adapter: Path,
    merged: Path,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "gates.toml").write_text(GATE, encoding="utf-8")
    pairs = []

    def measured(makers: Makers, now: Baseline, _: Gate) -> Baseline:
        pairs.append(makers.pair.keywords["adapters"])
        return now

    monkeypatch.setattr(gate, "measured", measured)
    given = ["gate", str(merged), str(make_checkpoint()), "--gates", str(tmp_path / "gates.toml")]
    refused_then_taken([*given, "--write-baseline", "--quiet"], adapter, capfd)
    assert pairs == [(adapter,)]


@pytest.mark.ort
def test_bench(
    adapter: Path, merged: Path, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    merged_into: list[Any] = []

    def measure(candidates: list[Candidate], *_: Any) -> None:
        merged_into.extend(candidate.make(1).keywords.get("adapters") for candidate in candidates)

    monkeypatch.setattr(bench, "bench", measure)
    options = BenchOptions((0,), (8,), (1,), batches=(1,), repeats=1)
    with pytest.raises(H1ExportError, match="by --adapter"):
        bench.bench_artifact(merged, None, make_checkpoint(), options=options)
    bench.bench_artifact(merged, None, make_checkpoint(), options=options, adapters=[adapter])
    assert merged_into == [None, [adapter]]


@pytest.mark.ort
def test_doctor_checks_an_artifact_with_its_adapter(
    adapter: Path, merged: Path, make_checkpoint: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["doctor", str(merged), str(make_checkpoint()), "--json"]
    passed = []
    for more in ([], ["--adapter", str(adapter)]):
        assert run([*given, *more]) == 0
        document = json.loads(capfd.readouterr().out)
        assert str(adapter) not in json.dumps(document)
        passed.append(document["findings"][-1]["passed"])
    assert passed == [None, True]


@pytest.mark.ort
def test_the_reference_that_is_timed_has_the_adapter(
    adapter: Path, merged: Path, make_checkpoint: Callable[..., Path]
) -> None:
    runner = load_folder(merged, float32=True)
    found, _ = runner.step(IDS[None], np.ones((1, len(IDS)), np.int64), runner.initial(1))
    errors = []
    for adapters in ((adapter,), ()):
        model = reference_model(make_checkpoint(), runner, 1, steps=1, clock=time.perf_counter, adapters=adapters)
        errors.append(relative_error(found[0], model._model.full(IDS)[0]))
    assert errors[0] <= EXACT < errors[1]


def test_sensitivity_is_that_of_the_merged_weights(
    adapter: Path, spoken_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Calibration(samples=1, length=16)
    found = [
        measure_sensitivity(spoken_checkpoint, QuantScheme("int4", method="rtn"), few, adapters=adapters)
        for adapters in ((), (adapter,))
    ]
    assert found[0].keys() == found[1].keys()
    assert found[0] != found[1]
    given = []
    monkeypatch.setattr(
        "h1export.commands.sensitivity.measure_sensitivity",
        lambda *_, adapters, **__: given.append(adapters) or found[1],
    )
    assert run(["sensitivity", str(spoken_checkpoint), "--adapter", str(adapter), "--quiet"]) == 0
    assert given == [(adapter,)]


def test_bench_needs_adapters_for_the_reference_only(
    adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", str(tmp_path), "--adapter", str(adapter)]) == 2
    assert "--against reference" in capfd.readouterr().err
