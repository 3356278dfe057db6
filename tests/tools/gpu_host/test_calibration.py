"""Section f in a dry run, and what its comparison refuses."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from h1export.checkpoint.store import WeightStore
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.quantize.methods.select import uncalibrated_integers

TREE = Path(__file__).parents[3]
sys.path[:0] = [str(TREE / "tools"), str(TREE / "benchmarks")]
from gpu_host.section import Host  # noqa: E402
from gpu_host.sections import calibration  # noqa: E402


@pytest.mark.slow
def test_a_dry_run_solves_builds_and_says_where_the_time_went(tmp_path: Path) -> None:
    beside, built = calibration.run(Host(tmp_path, tmp_path, "cpu"))
    assert (beside.passed, beside.figures["tensors"], beside.figures["least_equal"]) == (True, 9, 1.0)
    assert built.passed is None
    parts = [float(built.figures[name] or 0) for name in ("layers_s", "head_s", "rest_s")]
    assert all(seconds > 0 for seconds in parts)
    assert abs(sum(parts) - float(built.figures["total_s"] or 0)) < 0.1
    assert not (tmp_path / "calibration-artifact").exists()


def test_plain_rounding_fails_where_gptq_is_expected(tmp_path: Path) -> None:
    """The threshold tells a solver that does not look at the text from another order of sums."""
    checkpoint = calibration._dry_checkpoint(tmp_path)
    solved = calibration.layer_codes(checkpoint, calibration.DRY_TEXT)
    config = FalconH1Config.load(checkpoint)
    store = WeightStore.open(checkpoint, config)
    rounded = uncalibrated_integers(store, config, replace(calibration.SCHEME, method="search"))
    codes = {name: rounded.rows(name, 0, store.shape(name)[0]).codes for name in solved}
    assert calibration.compared("same", solved, solved).passed
    row = calibration.compared("rounded", solved, codes)
    assert not row.passed
    assert float(row.figures["least_equal"] or 0) < 0.9
    one_row = {name: np.where(np.arange(len(found))[:, None] == 0, -found, found) for name, found in solved.items()}
    assert calibration.compared("one row", solved, one_row).passed


def test_a_host_without_the_checkpoint_fails_by_name(tmp_path: Path) -> None:
    (row,) = calibration.run(Host(tmp_path, tmp_path, "cuda"))
    assert row.passed is False
    assert "run section s first" in row.detail
