"""Watch what a process holds while something is done many times: memory, descriptors, threads, mappings, children."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

MIB = 2**20
MOST_GROWTH = 0.03  # of the memory after the warm-up


@dataclass(frozen=True)
class Held:
    """What this process holds.

    Attributes:
        memory: Bytes of resident anonymous memory; pages of files come and go with the operating system's cache.
        descriptors: The number of open file descriptors.
        threads: The number of threads.
        mappings: The number of mapped files and libraries.
        children: The number of child processes, zombies too.
    """

    memory: int
    descriptors: int
    threads: int
    mappings: int
    children: int

    @classmethod
    def now(cls) -> Held:
        """Look, after all garbage was collected and free memory was returned."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        process = psutil.Process()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines())
        maps = Path("/proc/self/maps").read_text("utf-8").splitlines()
        return cls(
            memory=1024 * int(status["RssAnon"].split()[0]),
            descriptors=len(os.listdir("/proc/self/fd")),
            threads=process.num_threads(),
            mappings=sum(line.split(maxsplit=5)[5:] != [] and "/" in line for line in maps),
            children=len(process.children()),
        )


@dataclass(frozen=True)
class Cycles:
    """What was held after the warm-up and at the end, and how often something was done in between."""

    count: int
    before: Held
    after: Held

    @property
    def growth(self) -> float:
        """The growth of the memory as a share of what it was."""
        return self.after.memory / self.before.memory - 1

    @property
    def faults(self) -> list[str]:
        """What has grown."""
        names = ("descriptors", "threads", "mappings", "children")
        grown = [name for name in names if getattr(self.after, name) > getattr(self.before, name)]
        return grown + ["memory"] * (self.growth > MOST_GROWTH)

    def __str__(self) -> str:
        before, after = self.before, self.after
        changes = ", ".join(
            f"{name} {getattr(before, name)} to {getattr(after, name)}"
            for name in ("descriptors", "threads", "mappings", "children")
        )
        memory = f"memory {before.memory / MIB:.0f} to {after.memory / MIB:.0f} MiB ({self.growth:+.1%})"
        return f"{self.count} cycles, {memory}, {changes}" + "".join(f"; {name} GREW" for name in self.faults)


def repeat(work: Callable[[], object], count: int, warm_up: int) -> Cycles:
    """Do ``work`` so often, and compare what is held after ``warm_up`` times with what is held at the end."""
    for _ in range(warm_up):
        work()
    before = Held.now()
    for _ in range(count - warm_up):
        work()
    return Cycles(count, before, Held.now())
