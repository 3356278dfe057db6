"""Section g's loss curve after a training that was killed and started again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TREE = Path(__file__).parents[3]
sys.path[:0] = [str(TREE / "tools"), str(TREE / "benchmarks")]
from gpu_host.section import Host  # noqa: E402
from gpu_host.sections import proxy  # noqa: E402


def test_a_resumed_training_repeats_no_point_of_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are rarer than points, so a run that goes on computes some steps again."""
    reported = iter([[20, 40, 60, 80], [60, 80, 100]])

    def train(*_: Any, report: Callable[[int, float, float], None], **__: Any) -> float:
        points = next(reported)
        for step in points:
            report(step, float(len(points)), 0.1 * step)
        raise KeyboardInterrupt  # killed at the time limit

    monkeypatch.setattr(proxy, "train", train)
    monkeypatch.setattr(proxy, "modules", lambda: ({"abc": "def a(b):\n    return b\n" * 20}, {}))
    for steps in ([20, 40, 60, 80], [20, 40, 60, 80, 100]):
        with pytest.raises(KeyboardInterrupt):
            list(proxy.run(Host(tmp_path, tmp_path, "cpu")))
        curve = json.loads((tmp_path / "proxy" / "loss.json").read_text())
        assert [point["step"] for point in curve] == steps
    assert [point["loss_nats"] for point in curve] == [4, 4, 3, 3, 3]
