"""The rows of an artifact's decode in benchmarks/gpu/models.py, and which of them is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from h1export.artifact.artifact import Artifact
from h1export.targets.onnxruntime.variants import CPU, GRAPH_VARIANTS

pytestmark = pytest.mark.ort
ROOT = Path(__file__).parents[3]


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with the CPU provider in the place of CUDA's."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    stand_in = replace(GRAPH_VARIANTS["cuda"], provider=CPU)
    monkeypatch.setitem(GRAPH_VARIANTS, "cuda", stand_in)  # type: ignore[misc]  it is a dict
    from benchmarks.gpu import models

    return models


def test_sessions_are_timed_launched_and_captured(
    models: ModuleType, tiny: Path, build: Callable[..., Artifact]
) -> None:
    from roofline import Gpu

    folder = build(tiny, "int4", graph="cuda").folder
    rows = list(models.artifact_rows(folder, Gpu("test", 90, 1e9, tensor=1e12), "cpu"))
    assert [row.name.rpartition(", ")[2] for row in rows] == ["captured", "launched"]
    assert all(row.passed is None and row.figures["median_us"] > 0 for row in rows)  # a dry run judges nothing


@pytest.mark.parametrize(("times_bound", "expected"), [(1.9, True), (2.1, False)])
@pytest.mark.parametrize("quant", ["int4", "none"])
def test_captured_decode_of_int4_at_batch_1_is_held_to_twice_the_bound(
    quant: str,
    times_bound: float,
    expected: bool,
    *,
    models: ModuleType,
    tiny: Path,
    build: Callable[..., Artifact],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from roofline import Gpu

    gpu = Gpu("test", 90, 1e9, tensor=1e12)
    artifact = build(tiny, quant, graph="cuda")
    weights = (artifact.folder / "model.onnx.data").stat().st_size
    bounds = iter(
        models.decode_bytes(artifact.config, weights, batch, depth=models.DEPTH) / gpu.bandwidth
        for batch in 2 * models.BATCHES
    )

    def timing(*_: Any) -> tuple[Any, int]:
        return models.clock.summary([times_bound * next(bounds)], "wall clock"), models.DEPTH

    monkeypatch.setattr(models, "session_timing", timing)
    rows = list(models.artifact_rows(artifact.folder, gpu, "cuda"))
    assert len(rows) == 2 * len(models.BATCHES)
    judged = {row.name: row.passed for row in rows if row.passed is not None}
    if quant == "none":
        assert judged == {}
    else:
        ((name, passed),) = judged.items()
        assert " batch 1 " in name
        assert name.endswith(", captured")
        assert passed is expected
