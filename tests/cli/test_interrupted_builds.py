"""Builds that die: nothing at OUT, and the next build clears what they left."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from h1export.core.artifact import Artifact

BUILD = "import sys; from h1export.cli import run; sys.exit(run(sys.argv[1:]))"


def start(*words: str, limit: int | None = None) -> subprocess.Popen[str]:
    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored, and inherited so, where the tests run in the background
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen([sys.executable, "-c", BUILD, *words], stderr=subprocess.PIPE, text=True, preexec_fn=prepare)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_build_leaves_nothing_at_out(signum: int, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("build", str(tiny), "--target", "ort", "--out", str(out))
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.partial-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signum)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert not out.exists()
    left = list(tmp_path.iterdir())
    assert len(left) == (1 if signum == signal.SIGKILL else 0), left
    assert "Traceback" not in err
    again = start("build", str(tiny), "--target", "ort", "--out", str(out))
    assert again.wait(timeout=300) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    Artifact.open(out).check_hashes()


def test_a_full_disk_is_one_line_and_leaves_nothing(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A limit on file size stands in for the disk: writing fails in the middle of the weights."""
    process = start("build", str(make_checkpoint()), "--target", "ort", "--quant", "none", "--out", str(tmp_path / "out"), limit=300_000)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "free some space" in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_read_only_place_is_one_line(tiny: Path) -> None:
    process = start("build", str(tiny), "--target", "ort", "--out", "/proc/out")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err.startswith("h1export: /proc")
    assert "Traceback" not in err
