"""The measurements of benchmarks/gpu in a dry run: their rows, wrong kernels, and where shares come from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from roofline import Gpu, Shape, scan_work

from h1export.plugins.ssm_scan.tiles import MEASURED, TILES, tiles_for

pytestmark = pytest.mark.trt

GPU = Gpu("test", 90, 1e9, tensor=1e12)
SMALL = Shape("small", 2, 32, d_state=64, groups=1)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of benchmarks/gpu, which are found from the root."""
    root = Path(__file__).parents[3]
    monkeypatch.syspath_prepend(str(root))
    from benchmarks.gpu import ceilings, clock, contenders, kernels, models, results, tune

    return SimpleNamespace(
        ceilings=ceilings,
        clock=clock,
        contenders=contenders,
        kernels=kernels,
        models=models,
        results=results,
        tune=tune,
    )


def planted(contender: Any, *, factor: float, part: int) -> Any:
    """A contender whose y (part 0) or state (part 1) is multiplied by ``factor``."""

    def finish(answer: Any, ready: Any, inputs: Any) -> Any:
        made = list(contender.finish(answer, ready, inputs))
        made[part] = made[part] * factor
        return tuple(made)

    return dataclasses.replace(contender, name="peer", finish=finish)


@pytest.mark.parametrize("op", ["ssm_scan", "causal_conv"])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(("factor", "part"), [(1.1, 0), (0.0, 1), (float("nan"), 0), (float("nan"), 1)])
def test_a_wrong_kernel_is_reported_and_not_timed(
    gpu: SimpleNamespace, op: str, tokens: int, factor: float, part: int
) -> None:
    own = gpu.contenders.own(op)
    case = gpu.kernels.Case(op, SMALL, 1, tokens)
    makers = {"h1export": lambda: own, "peer": lambda: planted(own, factor=factor, part=part)}
    rows = {row.name.rpartition(": ")[2]: row for row in gpu.kernels.case_rows(case, GPU, "cpu", makers=makers)}
    assert "wrong" in rows["peer"].detail
    assert "median_us" not in rows["peer"].figures
    assert rows["h1export"].figures["median_us"] > 0
    wrong_ours = {"h1export": makers["peer"]}
    (row,) = gpu.kernels.case_rows(case, GPU, "cpu", makers=wrong_ours)
    assert row.passed is False
    assert "median_us" not in row.figures


def test_a_peer_that_cannot_be_imported_is_a_row(gpu: SimpleNamespace) -> None:
    def missing() -> Any:
        raise ImportError("No module named 'selective_scan_cuda'\nand more")

    case = gpu.kernels.Case("ssm_scan", SMALL, 1, 1)
    (row,) = gpu.kernels.case_rows(case, GPU, "cpu", makers={"peer": missing})
    assert row.detail == "does not run: ImportError: No module named 'selective_scan_cuda'"
    assert row.passed is None


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_share_is_the_counted_work_over_the_time(gpu: SimpleNamespace, tokens: int) -> None:
    case = gpu.kernels.Case("ssm_scan", SMALL, 2, tokens)
    makers = {"h1export": lambda: gpu.contenders.own("ssm_scan")}
    (row,) = gpu.kernels.case_rows(case, GPU, "cpu", makers=makers)
    works = scan_work(SMALL.problem(2, tokens)).values()
    bound = sum(max(work.bytes / GPU.bandwidth, work.operations / GPU.tensor) for work in works)
    assert row.figures["counted_bytes"] == sum(work.bytes for work in works)
    assert row.figures["roofline_share"] == pytest.approx(bound / (row.figures["median_us"] * 1e-6))
    assert row.passed is None  # a dry run judges nothing


@pytest.mark.parametrize(
    ("tokens", "batch", "share", "gain", "expected"),
    [
        (512, 1, 0.6, None, True),
        (512, 1, 0.5, 1.3, True),
        (512, 1, 0.5, 1.2, False),
        (512, 1, 0.5, None, False),
        (1, 64, 0.8, None, True),
        (1, 64, 0.7, 9.0, False),
        (1, 8, 0.1, None, None),
    ],
)
def test_what_is_required(
    gpu: SimpleNamespace, tokens: int, batch: int, share: float, gain: float | None, expected: bool | None
) -> None:
    assert gpu.kernels.met(gpu.kernels.Case("ssm_scan", SMALL, batch, tokens), share, gain) is expected


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tokens", [1, 20])
def test_adapted_inputs_are_the_same_function(gpu: SimpleNamespace, groups: int, tokens: int) -> None:
    """The inputs for flash-linear-attention, in its recurrence in float64, give our op's result."""
    inputs = gpu.contenders.scan_inputs(SMALL._replace(groups=groups), 2, tokens, device="cpu")

    def recurrence(ready: dict[str, torch.Tensor]) -> Any:
        q, k, v, g, state = (ready[name].double() for name in ("q", "k", "v", "g", "initial_state"))
        outputs = []
        for t in range(q.shape[1]):
            state = state * g[:, t].exp()[..., None, None] + k[:, t, :, :, None] * v[:, t, :, None, :]
            outputs.append((q[:, t, :, :, None] * state).sum(2))
        return torch.stack(outputs, 1), state

    answer = recurrence(gpu.contenders._gla_inputs(inputs))
    found = (answer[0] + inputs["x"].double() * inputs["D"].double()[:, None], answer[1].transpose(2, 3))
    assert gpu.contenders.error(found, gpu.contenders.scan_reference(inputs)) < 2e-3


def test_whole_models_agree_and_are_timed(gpu: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    gpu.results.report(gpu.models.run("cpu", gpu=GPU), "cpu", path=path)
    read = json.loads(path.read_text())
    assert read["dry"] is True
    assert read["versions"]["torch"]
    rows = {row["name"]: row for row in read["rows"]}
    assert rows["h1export agrees with transformers"]["passed"] is True
    timed = [row for row in rows.values() if "median_us" in row["figures"]]
    assert len(timed) == 6  # a decode step and prompts of two lengths, of two models
    assert all(row["detail"] == "dry run: no figure" for row in timed)


def test_the_first_candidates_fit_each_shape_that_is_timed(gpu: SimpleNamespace) -> None:
    for sizes in ((64, 128), (128, 256)):  # of section e's 0.5B and 7B
        for kernel, tiles in gpu.tune.FIRST.items():
            made = gpu.tune.first(TILES[sizes], sizes, kernel)
            assert len(made) == len(tiles)
            assert all(gpu.tune.fits(each, sizes) and each != TILES[sizes] for each in made)


def test_neighbours_fit_and_differ(gpu: SimpleNamespace) -> None:
    for sizes, row in TILES.items():
        assert gpu.tune.fits(row, sizes)
        for kernel in ("chunk_scan", "chunk_state", "state_passing", "chunk", "decode"):
            made = gpu.tune.neighbours(row, sizes, kernel)
            assert made
            assert all(gpu.tune.fits(each, sizes) and each != row for each in made)


def test_the_search_leaves_the_tables_as_they_were(gpu: SimpleNamespace) -> None:
    before = dict(TILES)
    ((row, sizes, best),) = gpu.tune.run("cpu", budget=60, limit=1)
    assert row.figures["timed"] > 0
    assert sizes == (32, 64)
    assert gpu.tune.fits(best, sizes)
    assert before == TILES
    assert MEASURED.get("cpu", {}) == {}


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", 'a "quoted" name', "it's \\ odd"])
def test_the_written_table_reads_back(gpu: SimpleNamespace, name: str) -> None:
    source = Path(gpu.tune.table.__file__).read_text(encoding="utf-8")
    rows = {(64, 128): TILES[64, 128]._replace(chunk=64), (32, 64): TILES[32, 64]}
    made = ModuleType("made_tiles")
    exec(compile(gpu.tune.with_measured(source, {name: rows}), "tiles.py", "exec"), made.__dict__)
    assert {sizes: tuple(row) for sizes, row in made.MEASURED[name].items()} == {s: tuple(r) for s, r in rows.items()}
    assert gpu.tune.with_measured(gpu.tune.with_measured(source, {name: rows}), MEASURED) == source
    assert tiles_for(64, 128).chunk == TILES[64, 128].chunk
