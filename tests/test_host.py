"""Facts about the process and the machine, against memory that is taken and a planted /proc/cpuinfo."""

from __future__ import annotations

import mmap
import os
import platform
import sys
from pathlib import Path

import numpy as np
import pytest

from h1export import host

SIZE = 64 << 20  # bytes


def test_anonymous_memory_grows_by_what_is_taken_and_files_do_not_count(tmp_path: Path) -> None:
    before = host.anonymous_bytes()
    taken = np.ones(SIZE, np.uint8)
    assert 0.9 * SIZE < host.anonymous_bytes() - before < 1.1 * SIZE
    resident = host.resident_bytes()
    (tmp_path / "file").write_bytes(taken)
    with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert np.frombuffer(mapped, np.uint8).sum() == SIZE
        if platform.system() == "Linux":
            assert host.resident_bytes() - resident > 0.9 * SIZE
            assert host.anonymous_bytes() - before < 1.1 * SIZE


def test_the_peak_stays_when_memory_is_given_back() -> None:
    taken = np.ones(SIZE, np.uint8)
    held = host.resident_bytes()
    assert host.peak_resident_bytes() >= 0.99 * held
    del taken
    assert host.peak_resident_bytes() >= 0.99 * held


def test_cores_are_those_this_process_may_use() -> None:
    assert 1 <= host.cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("model name : x\nflags : fpu avx2 fma\n", "avx2"),
        ("flags : fpu avx2 fma avx512f avx512_vnni\n\nflags : fpu\n", "avx2 avx512f avx512_vnni"),
        ("Features : fp asimddp i8mm\n", "asimddp i8mm"),
    ],
)
def test_kinds_of_cpu_are_told_apart_by_what_kernels_choose_by(
    text: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    assert host.cpu_kind() == platform.machine()
    (tmp_path / "cpuinfo").write_text(text)
    assert host.cpu_kind() == f"{platform.machine()} {kind}"


def test_the_machine_has_the_model_name_of_its_first_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name : One: 3 GHz\n\nprocessor : 1\nmodel name : Two\n")
    facts = host.machine_facts()
    assert facts["cpu"] == "One: 3 GHz"
    assert facts["machine"] == platform.machine()
    assert facts["cores"] == os.cpu_count()


def test_a_process_is_pinned_to_as_many_cores_as_threads() -> None:
    if sys.platform != "linux":
        assert host.pin(1) == ()
        return
    before = os.sched_getaffinity(0)
    try:
        assert host.pin(1) == (max(before),) == tuple(os.sched_getaffinity(0))
        assert host.pin(99) == (max(before),)
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide for themselves")
def test_freed_memory_goes_back() -> None:
    """Small blocks below one that is still held: glibc keeps them."""
    blocks = [np.ones(8192) for _ in range(1000)]
    last = np.ones(8192)
    held = host.anonymous_bytes()
    del blocks
    host.return_freed_memory()
    assert host.anonymous_bytes() < held - 900 * last.nbytes
