"""The table of tiles: which row a call takes, and what every row must obey."""

from __future__ import annotations

import pytest

from h1export.errors import H1ExportError
from h1export.plugins.ssm_scan.launch import Problem, kernels, launches
from h1export.plugins.ssm_scan.tiles import MEASURED, TILES, ScanTiles, Tile, tiles_for

GPU = "NVIDIA H100 80GB HBM3"
SIZES = (64, 128)
OTHER = ScanTiles(64, Tile(64, 32, 32, 8, 2), Tile(1, 256, 1, 2, 2), Tile(32, 32, 64, 2, 3), Tile(1, 4, 128, 1, 1))


def problem(tokens: int, device_name: str | None) -> Problem:
    (d_head, d_state) = SIZES
    return Problem(
        2,
        tokens,
        4,
        groups=1,
        d_head=d_head,
        d_state=d_state,
        dtype="fp16",
        dt_min=0.0,
        dt_max=1.0,
        device_name=device_name,
    )


def test_a_measured_row_serves_its_own_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MEASURED, GPU, {SIZES: OTHER})
    assert tiles_for(*SIZES, GPU) == OTHER
    assert tiles_for(*SIZES) == tiles_for(*SIZES, "another GPU") == TILES[SIZES]
    assert tiles_for(64, 256, GPU) == TILES[64, 256]


def test_launches_and_kernels_follow_the_measured_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids, constants, warps, stages and the workspace are those of one row; a mixture would compute nonsense."""
    monkeypatch.setitem(MEASURED, GPU, {SIZES: OTHER})
    launched = launches(problem(130, GPU)) + launches(problem(1, GPU))
    assert [(launch.kernel.name, launch.grid) for launch in launched] == [
        ("chunk_state", (2 * 4, 3, 8)),
        ("state_passing", (64 * 128 // 256, 8, 1)),
        ("chunk_scan", (2 * 2, 3, 8)),
        ("decode", (16, 8, 1)),
    ]
    assert tuple(launch.kernel for launch in launched) == kernels(*SIZES, "fp16", device_name=GPU)
    assert [(k.warps, k.stages) for k in kernels(*SIZES, "fp16", device_name=GPU)] == [(8, 2), (2, 2), (2, 3), (1, 1)]
    assert problem(130, GPU).workspace()["local"][0] == (2, 4, 3, *SIZES)
    assert problem(130, None).workspace()["local"][0] == (2, 4, 1, *SIZES)


def test_sizes_without_a_row_are_refused_on_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MEASURED, GPU, {SIZES: OTHER})
    for device_name in (None, GPU):
        with pytest.raises(H1ExportError, match="no GPU kernel for head dim 48 and state size 64"):
            tiles_for(48, 64, device_name)


@pytest.mark.parametrize("device_name", [None, *MEASURED])
def test_every_row_divides_its_problem(device_name: str | None) -> None:
    rows = TILES if device_name is None else MEASURED[device_name]
    assert rows.keys() <= TILES.keys()  # else only one GPU would have these sizes
    for (d_head, d_state), tiles in rows.items():
        assert tiles.chunk % tiles.chunk_state.tokens == tiles.chunk % tiles.chunk_scan.tokens == 0
        assert d_head % tiles.chunk_state.rows == d_head % tiles.chunk_scan.rows == d_head % tiles.decode.rows == 0
        assert d_state % tiles.chunk_state.columns == d_state % tiles.chunk_scan.columns == 0
        assert d_head * d_state % tiles.state_passing.rows == 0
