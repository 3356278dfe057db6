"""Profiles of a call that falls short: torch.profiler's table, and the command for ncu."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

REPEATS = 5


def write(folder: Path, name: str, call: Callable[[], Any], *, device: str) -> Path:
    """Write the profile of ``call`` to a text file in ``folder``, and return its path."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device != "cpu" else [])
    call()
    with profile(activities=activities) as recorded:
        for _ in range(REPEATS):
            call()
    order = "self_cuda_time_total" if device != "cpu" else "self_cpu_time_total"
    table = recorded.key_averages().table(sort_by=order, row_limit=25)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (name.replace(" ", "_").replace(":", "") + ".txt")
    command = "ncu --set full --target-processes all --launch-count 20 -o REPORT python -m benchmarks.gpu.kernels"
    path.write_text(f"{name}\n{table}\nFor the counters of the GPU:\n{command}\n", encoding="utf-8")
    return path
