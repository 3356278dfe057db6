"""A bundle is made, joined and run on a CPU; every section of run.py passes there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_host import join, pack, results
from gpu_host.section import SECTIONS


@pytest.mark.slow
@pytest.mark.trt
def test_every_section_passes_in_a_dry_run(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    small = ["--no-wheels", "--no-plugin", "--model", "tiny-90M", "--layers", "1", "--part-mb", "5"]
    assert pack.main([str(parts), *small, "--groups", "core,shape"]) == 0
    assert max(file.stat().st_size for file in parts.glob("*.part")) <= 5 * pack.MB
    folder = tmp_path / "bundle"
    assert join.main([str(parts), "--out", str(folder)]) == 0
    command = [sys.executable, str(folder / "tree/tools/gpu_host/run.py"), "--device", "cpu"]
    letters = ",".join(section.letter for section in SECTIONS)
    out = tmp_path / "results"
    done = subprocess.run([*command, "--out", str(out), "--only", letters], capture_output=True, text=True, check=False)
    found = {section["letter"]: section for section in results.read(out / results.FILE)}
    logs = {letter: section["log"][-1500:] for letter, section in found.items()}
    assert done.returncode == 0, done.stdout + done.stderr + json.dumps(logs)
    assert set(found) == {section.letter for section in SECTIONS}
    assert all(results.passed(section) and section["run"]["dry"] for section in found.values())
