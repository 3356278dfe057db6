"""Facts about this process and this machine: memory, cores, processor."""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

CPUINFO = Path("/proc/cpuinfo")
STATUS = Path("/proc/self/status")
FLAGS = (  # instruction sets by which int8 and float32 kernels are chosen
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "asimddp",
    "i8mm",
    "sve",
)


def cores() -> int:
    """Return the number of cores that this process may use."""
    process = psutil.Process()
    # macOS has no affinity
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1


def pin(threads: int) -> tuple[int, ...]:
    """Keep this process on as many cores as it has threads, so that they do not migrate.

    Returns the cores, or none on a system without affinity. They are the last ones, because systems tend to run their
    own work on the first.
    """
    process = psutil.Process()
    if not hasattr(process, "cpu_affinity"):
        return ()
    cores = sorted(process.cpu_affinity())[-threads:]
    process.cpu_affinity(cores)
    return tuple(cores)


def resident_bytes() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Return the largest resident memory that this process has had, in bytes.

    Linux reports it as VmHWM, which psutil does not read; ru_maxrss there counts the parent's memory before exec too.
    Windows reports it as peak_wset.
    """
    if STATUS.exists():
        fields = dict(line.split(":", 1) for line in STATUS.read_text(encoding="ascii").splitlines())
        return 1024 * int(fields["VmHWM"].split()[0])
    found = psutil.Process().memory_info()
    if hasattr(found, "peak_wset"):
        return int(found.peak_wset)
    if find_spec("resource") is None:
        return int(found.rss)  # the best that such a system reports
    usage = import_module("resource")
    return int(usage.getrusage(usage.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def anonymous_bytes() -> int:
    """Return the memory of this process that no file backs, in bytes.

    Where the system does not report it, this is the peak of all memory.
    """
    found = psutil.Process().memory_info()
    return int(found.rss - found.shared) if hasattr(found, "shared") else peak_resident_bytes()


def return_freed_memory() -> None:
    """Return memory that was freed to the system, where it is glibc that would keep it for later.

    glibc keeps freed blocks of up to 32 MiB. Where sizes change from one phase of the work to the next, they add up.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    """Return glibc's function, or None where the C library has none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def machine_facts() -> dict[str, Any]:
    """Return what figures are measured on: architecture, processor, cores, operating system, Python."""
    return {
        "machine": platform.machine(),
        "cpu": _cpuinfo().get("model name") or platform.processor(),
        "cores": psutil.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def cpu_kind() -> str:
    """Return the architecture and the instruction sets by which kernels differ.

    Within one kind, ratios of two programs' times hold from machine to machine.
    """
    facts = _cpuinfo()
    flags = set(facts.get("flags", facts.get("Features", "")).split())  # x86 and Arm name the line differently
    return " ".join([platform.machine(), *(flag for flag in FLAGS if flag in flags)])


def _cpuinfo() -> dict[str, str]:
    """Return the facts of the first core in /proc/cpuinfo, by name; psutil has neither its model name nor its flags."""
    text = CPUINFO.read_text(encoding="utf-8") if CPUINFO.exists() else ""
    facts: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    return facts
