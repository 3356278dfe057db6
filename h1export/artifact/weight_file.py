"""The file that holds a build's weights, written tensor by tensor, row block by row block, and resumed after a kill."""

from __future__ import annotations

import errno
import hashlib
import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from h1export.artifact.journal import READ_BYTES, Extent, Journal
from h1export.artifact.staging import Stage

BLOCK_BYTES = 4 << 20  # of float32 rows that a thread works on at a time: they stay in the caches

Rows = npt.NDArray[Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Columns:
    """``values`` [rows, n] that stand beside others in a tensor's rows, ``start`` bytes from the left. In any order, each once."""

    values: Rows
    start: int


Block = Callable[[], Sequence[Rows | Columns]]  # computes the next rows, or some columns, of one or more tensors


class WeightFile:
    """The file ``name`` of ``stage``: hands out places in it, one after the other, and fills them.

    Places depend on nothing but the order of the calls, so a build that goes on after a kill finds its tensors where they were.
    """

    def __init__(self, stage: Stage, name: str) -> None:
        self._stage = stage
        self._name = name
        self._end = 0
        self._journal = Journal(stage.folder)
        self._once: dict[Hashable, Any] = {}
        self._handle = os.open(stage.folder / name, os.O_CREAT | os.O_RDWR, 0o644)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                os.ftruncate(self._handle, self._end)
        finally:
            os.close(self._handle)

    def reserve(self, tensor: str, nbytes: int, align: int) -> Extent:
        """The next place that starts at a multiple of ``align`` bytes."""
        offset = -(-self._end // align) * align
        self._end = offset + nbytes
        return Extent(self._name, tensor, offset, length=nbytes)

    def once(self, key: Hashable, write: Callable[[], T]) -> T:
        """What ``write()`` returned the first time: graphs that share this file share their tensors."""
        if key not in self._once:
            self._once[key] = write()
        return self._once[key]  # type: ignore[no-any-return]

    def holds(self, extent: Extent) -> bool:
        """Whether an earlier build, or this one, has written it."""
        return self._journal.holds(extent)

    def write(self, extents: Sequence[Extent], blocks: Iterable[Block]) -> None:
        """Fill ``extents``, whose rows ``blocks`` compute from the top, one array an extent and block.

        Nothing is computed for a plan, nor where an earlier build wrote the same. Memory holds ``jobs`` blocks and their results.

        Raises:
            ValueError: more or fewer bytes than the extents have.
            OSError: the disk is full.
        """
        if self._stage.dry or all(self._journal.holds(extent) for extent in extents):
            return
        writers = [_Writer(self._handle, extent) for extent in extents]
        for arrays in in_order(blocks, self._stage.jobs):
            for writer, rows in zip(writers, arrays, strict=True):
                writer.write(rows)
        for writer in writers:
            self._journal.add(writer.extent, writer.close())


class _Writer:
    """One tensor on its way into the file."""

    def __init__(self, handle: int, extent: Extent) -> None:
        self.extent = extent
        self._handle = handle
        self._next = extent.offset
        self._end = extent.offset + extent.length
        self._digest: Any = hashlib.sha256()

    def write(self, rows: Rows | Columns) -> None:
        if isinstance(rows, Columns):
            return self._write_columns(rows)
        data = memoryview(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
        if self._next + len(data) > self._end:
            raise ValueError(f"{self.extent.tensor}: more bytes than its shape says")
        self._digest.update(data)
        while data:
            written = os.pwrite(self._handle, data, self._next)
            self._next += written
            data = data[written:]
        return None

    def _write_columns(self, columns: Columns) -> None:
        data = np.ascontiguousarray(columns.values).view(np.uint8)
        row_bytes = self.extent.length // len(data)
        if self._next + data.nbytes > self._end or columns.start + data.shape[1] > row_bytes:
            raise ValueError(f"{self.extent.tensor}: more bytes than its shape says")
        for row, line in enumerate(data):
            if os.pwrite(self._handle, line, self.extent.offset + row * row_bytes + columns.start) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.extent.file)
        self._next += data.nbytes
        self._digest = None

    def close(self) -> str:
        """The sha256 of what was written."""
        if self._next != self._end:
            raise ValueError(f"{self.extent.tensor}: {self._end - self._next} bytes missing")
        return self._digest.hexdigest() if self._digest else self._read_digest()

    def _read_digest(self) -> str:
        """Columns are no order to take a digest in."""
        digest = hashlib.sha256()
        start = self.extent.offset
        while start < self._end:
            data = os.pread(self._handle, min(READ_BYTES, self._end - start), start)
            digest.update(data)
            start += len(data)
        return digest.hexdigest()


def in_order(calls: Iterable[Callable[[], T]], jobs: int) -> Iterator[T]:
    """The results of ``calls`` in their order, computed by ``jobs`` threads that run at most ``jobs`` calls ahead."""
    if jobs == 1:
        yield from (call() for call in calls)
        return
    with ThreadPoolExecutor(jobs) as pool:
        pending: deque[Future[T]] = deque()
        try:
            for call in calls:
                pending.append(pool.submit(call))
                if len(pending) > jobs:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
