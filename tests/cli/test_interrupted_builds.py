"""Builds that die: nothing at OUT, and the next build goes on with what they left, or clears it."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from h1export import cli
from h1export.artifact.artifact import Artifact

BUILD = "import sys; from h1export.cli import run; sys.exit(run(sys.argv[1:]))"


def start(*words: str, limit: int | None = None) -> subprocess.Popen[str]:
    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored, and inherited so, where the tests run in the background
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-c", BUILD, *words], stderr=subprocess.PIPE, text=True, preexec_fn=prepare
    )


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_build_leaves_nothing_at_out(signum: int, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("build", str(tiny), "--target", "ort", "--method", "rtn", "--out", str(out))
    process = start(*words)
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
    assert cli.run([*words]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    Artifact.open(out).check_hashes()


# A mount namespace of its own, where the system lets users make one: mounts PLACE, builds there, and lists the rest.
MOUNTED = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
MOUNTS = {
    "full": ('mount -t tmpfs -o size=400k none "$0"', "free some space"),
    "read-only": ('mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"', "nothing can be written into"),
}


def can_mount() -> bool:
    """Whether this system lets users mount things for themselves; many containers do not."""
    try:
        return subprocess.run([*MOUNTED, "mount -t tmpfs none /tmp"], check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("kind", ["limit", *(MOUNTS if can_mount() else ())])
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(
    kind: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A limit on file size stands in for the disk everywhere: writing fails in the middle of the weights."""
    words = ["build", str(make_checkpoint()), "--target", "ort", "--quant", "none", "--out", str(tmp_path / "out")]
    if kind == "limit":
        message = "free some space"
        process = start(*words, limit=300_000)
    else:
        mount, message = MOUNTS[kind]
        script = f'{mount} || exit 9; "$@"; code=$?; ls -A "$0"; exit $code'
        command = [*MOUNTED, script, str(tmp_path), sys.executable, "-c", BUILD, *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    listed, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert message in err
    assert "Traceback" not in err
    assert not listed
    assert not list(tmp_path.iterdir())


def test_a_read_only_place_is_one_line(tiny: Path) -> None:
    process = start("build", str(tiny), "--target", "ort", "--out", "/proc/out")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err.startswith("h1export: /proc")
    assert "Traceback" not in err


def test_a_copy_to_a_full_disk_names_the_copy() -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/source", None, "/b/copy")
    assert cli._message(error).startswith("/b/copy: No space left on device; free some space")
