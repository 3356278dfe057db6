"""What repeat() finds: nothing where nothing is kept, and each kind of thing that is."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from endurance.steady import Cycles, repeat

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")  # as CI's machines have


def test_nothing_is_kept() -> None:
    found = repeat(lambda: np.ones(1 << 20).sum(), 60, 10)
    assert found.faults == []
    assert "GREW" not in str(found)
    assert found.count == 60


@pytest.mark.parametrize("kind", ["memory", "descriptors", "threads", "mappings", "children"])
def test_what_is_kept_is_found(kind: str, tmp_path: Path) -> None:
    kept: list[Any] = []
    end = Event()
    (file := tmp_path / "file").write_bytes(bytes(mmap.PAGESIZE))

    def thread() -> None:
        kept.append(Thread(target=end.wait, daemon=True))
        kept[-1].start()

    def mapping() -> None:
        with file.open("rb") as opened:
            kept.append(mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ))

    leaks: dict[str, Callable[[], Any]] = {
        "memory": lambda: kept.append(np.ones(1 << 20)),
        "descriptors": lambda: kept.append(tempfile.TemporaryFile()),  # noqa: SIM115
        "threads": thread,
        "mappings": mapping,
        "children": lambda: kept.append(subprocess.Popen(["sleep", "60"])),
    }
    found: Cycles | None = None
    try:
        found = repeat(leaks[kind], 12, 2)
    finally:
        end.set()
        for process in kept if kind == "children" else ():
            process.kill()
            process.wait()
        for file_object in kept if kind == "descriptors" else ():
            os.fstat(file_object.fileno())
            file_object.close()
    assert kind in found.faults
    assert f"{kind} GREW" in str(found)
