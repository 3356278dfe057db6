"""The JSON file of a measurement: where and when it ran, with which versions, and its rows."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_host import dry
from gpu_host.section import Row

PACKAGES = ("torch", "triton", "transformers", "mamba-ssm", "fla-core", "onnxruntime-gpu", "h1export")


def device() -> str:
    """Return "cuda" where there is a GPU; otherwise "cpu", with Triton's interpreter switched on."""
    if torch.cuda.is_available():
        return "cuda"
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it at its import
    return "cpu"


def versions() -> dict[str, str]:
    """Return the version of each package that is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def driver() -> str:
    """Return the version of NVIDIA's driver, or an empty text."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def head(device: str) -> dict[str, Any]:
    """Return what a file of results says besides its rows; a dry run's figures are never reported."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "dry": device == "cpu",
        "driver": driver(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def report(rows: Iterable[Row], device: str, *, path: Path | None) -> None:
    """Print each row when it comes, and write all so far to ``path``."""
    made: list[dict[str, Any]] = []
    with dry.mended_interpreter() if device == "cpu" else nullcontext():  # a row is computed when it is asked for
        for row in rows:
            figures = ", ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in row.figures.items()
            )
            state = {True: "passed", False: "FAILED", None: "-"}[row.passed]
            print(state, row.name, figures, row.detail, sep=" | ", flush=True)
            made.append({**asdict(row), "figures": dict(row.figures)})
            if path is not None:
                path.write_text(json.dumps(head(device) | {"rows": made}, indent=1) + "\n", encoding="utf-8")
