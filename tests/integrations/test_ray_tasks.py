"""A sweep by Ray's tasks on this machine: killed and begun again, and with a task whose process is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from h1export.report.swept import Swept

pytestmark = [pytest.mark.ray, pytest.mark.ort]
SECONDS = 240.0
TRIES = 3  # Ray gives a node 30 seconds to start, which a busy machine may need twice
SWEEP = {
    "checkpoints": {"one": "model"},
    "targets": ["ort"],
    "precisions": ["int8", "none", "int4"],
    "methods": ["rtn"],
    "validate": {"text_bytes": 600, "prompts": 0},
    "cpus": 1,
}


class Run:
    """`h1export sweep` in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = self._started()

    def _started(self) -> subprocess.Popen[str]:
        program = str(Path(sys.executable).with_name("h1export"))
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        words = [program, "sweep", "sweep.yaml", "--out", "out", "--json"]
        return subprocess.Popen(
            words, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def family(self) -> list[psutil.Process]:
        """All processes below it."""
        return psutil.Process(self._process.pid).children(recursive=True)

    def tasks(self) -> list[psutil.Process]:
        """Ray's processes that compute cells."""
        found = []
        for process in self.family():
            try:
                words = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if words.startswith("ray::task"):
                found.append(process)
        return found

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait for something; begin again where Ray does not start in time."""
        end = time.monotonic() + SECONDS
        tries = 1
        while not condition():
            assert time.monotonic() < end, "nothing happens"
            if self._process.poll() is not None:
                said = self._process.communicate()[1]
                assert "Ray does not start" in said, said
                assert tries < TRIES, said
                self._process, tries = self._started(), tries + 1
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill all of it at once."""
        family = self.family()
        self._process.kill()
        for process in family:
            if process.is_running():
                process.kill()
        self._process.communicate()

    def result(self) -> tuple[int, dict[str, Any]]:
        """Wait for its end, and return its exit code and its answer."""
        for _ in range(TRIES):
            said, messages = self._process.communicate(timeout=SECONDS)
            if said:
                assert said.startswith("{"), said
                return self._process.returncode, json.loads(said)
            assert "Ray does not start" in messages, messages
            self._process = self._started()
        raise AssertionError(messages)


@pytest.fixture
def folder(spoken_checkpoint: Path, tmp_path: Path) -> Path:
    (tmp_path / "model").symlink_to(spoken_checkpoint)
    (tmp_path / "sweep.yaml").write_text(json.dumps(SWEEP))  # JSON is YAML
    return tmp_path


def records(folder: Path) -> list[Path]:
    return sorted((folder / "out").glob("*.json"))


def test_a_killed_sweep_goes_on_and_a_killed_task_is_done_again(folder: Path) -> None:
    first = Run(folder)
    first.until(lambda: records(folder))
    first.kill()
    known = {path: path.stat().st_mtime_ns for path in records(folder)}
    assert 0 < len(known) < 3
    second = Run(folder)
    second.until(second.tasks)
    second.tasks()[0].kill()
    code, answer = second.result()
    assert (code, len(answer["cells"])) == (0, 3)
    assert all(cell["passed"] and not cell["error"] for cell in answer["cells"])
    assert {path: path.stat().st_mtime_ns for path in known} == known
    assert [Swept.read(path).name for path in records(folder)] == sorted(cell["name"] for cell in answer["cells"])
    assert (folder / "out" / "sweep.html").is_file()
    assert not list((folder / "out").glob(".*"))  # nothing half-written


def test_a_cluster_that_is_not_there_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from h1export.cli import run

    words = ["sweep", str(folder / "sweep.yaml"), "--out", str(folder / "out"), "--address", "127.0.0.1:1", "--quiet"]
    assert run(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "127.0.0.1:1: Ray does not start there" in said
