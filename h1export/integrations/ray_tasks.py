"""Cells of a sweep as tasks of Ray's, on this machine or on a cluster."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from typing import Any

import ray
from ray.exceptions import RayError

from h1export.commands.sweep import Cell
from h1export.errors import H1ExportError
from h1export.report.swept import Swept

RETRIES = 2  # of a task whose process or machine has ended
REACHABLE = 10.0  # seconds
NO_RAY = "Ray does not start there"
NEXT = "give the --address of a cluster, or --in-process"
OBJECTS = 100 << 20  # bytes of shared memory: results are small


def by_ray(
    work: Callable[[Cell], Swept], wanted: Sequence[Cell], *, address: str | None, cpus: int, gpus: int
) -> Iterator[Swept]:
    """Yield what is known of each cell, as they finish.

    Args:
        work: Returns what is known of a cell; it goes to Ray's processes.
        wanted: The cells.
        address: The cluster's address; None starts Ray on this machine, and ends it afterwards.
        cpus: The cores of a cell.
        gpus: The GPUs of a cell.

    Raises:
        H1ExportError: There is no cluster at the address, or Ray does not start.
    """
    _check_reachable(address)
    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECTS} if address is None else {}
    with redirect_stdout(sys.stderr):  # where the answer of the command goes, Ray prints about processes that end
        try:
            ray.init(address=address or "local", log_to_driver=False, configure_logging=False, **local)
        except Exception as error:  # Ray raises this class itself where a node takes too long
            what = f"{NO_RAY} ({' '.join(str(error).split())})"
            raise H1ExportError(address or "this machine", what, NEXT) from None
        try:
            yield from _results(work, wanted, cpus, gpus=gpus)
        finally:
            ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Raise H1ExportError where nobody listens at HOST:PORT: Ray would wait for minutes."""
    found = re.fullmatch(r"(?:ray://)?(?P<host>[^/]+):(?P<port>[0-9]{1,5})", address or "")
    if found is None:  # a word of Ray's, such as auto
        return
    try:
        socket.create_connection((found["host"], int(found["port"])), REACHABLE).close()
    except (OSError, OverflowError) as error:
        raise H1ExportError(
            str(address), f"{NO_RAY} ({getattr(error, 'strerror', None) or 'no such address'})", NEXT
        ) from None


def _results(work: Callable[[Cell], Swept], wanted: Sequence[Cell], cpus: int, *, gpus: int) -> Iterator[Swept]:
    @ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)
    def task(cell: Cell) -> Swept:
        return work(cell)

    pending = {task.remote(cell): cell for cell in wanted}
    while pending:
        (done,), _ = ray.wait(list(pending), num_returns=1)
        cell = pending.pop(done)
        try:
            yield ray.get(done)
        except RayError as error:
            what = str(error).strip().splitlines()[-1] if str(error).strip() else "its process has ended"
            yield cell.swept(error=f"{type(error).__name__}: {what}")
