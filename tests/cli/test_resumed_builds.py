"""Builds that are killed again and again, and end with the bytes of one that no kill interrupted."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from h1export.artifact.journal import JOURNAL
from h1export.checkpoint.store import WeightStore
from h1export.commands.build import build_artifact
from h1export.quantize.scheme import QuantScheme

# Kills builds at OUT KILLS times, each a few tensors after those that the builds before it wrote; then lets one finish.
# Tensors are counted and not seconds, because a busy machine stretches the parts of a build differently.
# The graph is traced once, before the processes part.
BUILDS = """
import os, random, sys, time
from pathlib import Path
from h1export.commands import build
from h1export.model.falcon_h1.config import FalconH1Config
checkpoint, truth, out = map(Path, sys.argv[1:4])
seed, kills = map(int, sys.argv[4:])
program = build.trace(FalconH1Config.load(checkpoint), False)
build.trace = lambda *_: program
def started(place, jobs):
    child = os.fork()
    if not child:
        build.build_artifact(checkpoint, "ort", place, force=True, jobs=jobs)
        os._exit(0)
    return child
def written():
    stages = list(out.parent.glob(".out.partial-*"))
    assert len(stages) <= 1, stages
    try:
        return sum(len((stage / ".journal").read_bytes().splitlines()) for stage in stages)
    except FileNotFoundError:  # not yet, or no longer
        return 0
assert os.waitpid(started(truth, 1), 0)[1] == 0
moments = random.Random(seed)
for _ in range(kills):
    wanted = written() + moments.randint(0, 12)
    child = started(out, moments.choice((1, 2, 3)))
    while written() < wanted and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.001)
    time.sleep(moments.uniform(0, 0.01))
    os.kill(child, 9)
    os.waitpid(child, 0)
    print(written(), flush=True)
assert os.waitpid(started(out, 2), 0)[1] == 0
"""


def sha256s(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_ten_kills_change_no_byte(tiny: Path, tmp_path: Path) -> None:
    truth = tmp_path / "truth"
    out = tmp_path / "out"
    words = [sys.executable, "-c", BUILDS, str(tiny), str(truth), str(out), "7", "10"]
    run = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    assert sha256s(out) == sha256s(truth)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "truth"]
    finished = [int(count) for count in run.stdout.split()]
    assert len(finished) == 10
    assert len(set(finished)) > 3, f"tensors written at the kills: {finished}"


@pytest.fixture
def killed(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """killed(key) leaves the stage of a build whose weights are all written; the list gets the tensors read."""
    read: list[str] = []
    rows = WeightStore.rows

    def build(checkpoint: Path, out: Path, scheme: QuantScheme) -> list[str]:
        with monkeypatch.context() as patched:
            patched.setattr("h1export.artifact.staging.shutil.rmtree", lambda *_, **__: None)
            patched.setattr("h1export.commands.build.file_table", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                build_artifact(checkpoint, "ort", out, scheme=scheme)
        monkeypatch.setattr(
            WeightStore, "rows", lambda store, name, *range_: (read.append(name), rows(store, name, *range_))[1]
        )
        return read

    return build


def test_a_build_goes_on_without_reading_what_is_written(
    killed: Callable[..., list[str]], tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    read = killed(tiny, out, QuantScheme())
    assert list(tmp_path.glob(f".out.partial-*/{JOURNAL}"))
    artifact = build_artifact(tiny, "ort", out)
    assert read == []
    artifact.check_hashes()
    assert not list(out.glob(JOURNAL))


def test_another_scheme_starts_anew(killed: Callable[..., list[str]], tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    read = killed(tiny, out, QuantScheme())
    artifact = build_artifact(tiny, "ort", out, scheme=QuantScheme("int4", 64))
    assert len(set(read)) == len(WeightStore.open(tiny, artifact.config).entries)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_checkpoint_starts_anew(
    killed: Callable[..., list[str]], copy_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """One changed byte in one tensor: nothing of the old build is used."""
    checkpoint = copy_checkpoint()
    out = tmp_path / "out"
    read = killed(checkpoint, out, QuantScheme("int8"))
    data = bytearray((checkpoint / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (checkpoint / "model.safetensors").write_bytes(data)
    artifact = build_artifact(checkpoint, "ort", out, scheme=QuantScheme("int8"))
    assert len(set(read)) == len(WeightStore.open(checkpoint, artifact.config).entries)
    assert not list(tmp_path.glob(".out*"))
