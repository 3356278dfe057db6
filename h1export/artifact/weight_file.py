"""WeightFile: the file of a build's weights, written tensor by tensor, in blocks of rows, and resumed after a kill.

Targets reserve a place for each tensor and pass functions that compute its rows. The threads of the stage compute them,
and the file is written in order, so its bytes do not depend on the number of threads.
"""

from __future__ import annotations

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

from h1export.artifact.files import sha256_range
from h1export.artifact.journal import Extent, Journal
from h1export.artifact.stage import Stage

BLOCK_BYTES = 4 << 20  # float32 bytes that a thread computes at a time, few enough to stay in the caches

Rows = npt.NDArray[Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Columns:
    """A range of a tensor's columns, for all of its rows.

    A column-major source computes a tensor by columns. The ranges may be written in any order, and each byte of the
    tensor exactly once.

    Attributes:
        values: [rows, n], n columns of every row.
        start: byte offset of the first column within a row of the file.
    """

    values: Rows
    start: int


# Computes the next rows, or a range of columns, of one or more tensors: one array per tensor.
Block = Callable[[], Sequence[Rows | Columns]]


class WeightFile:
    """The weight file ``name`` of ``stage``, a context manager.

    ``reserve`` assigns places one after the other, and ``write`` fills them. Places depend only on the order of the
    calls, so a build that continues after a kill finds its tensors where they were.
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
        """Assign ``tensor`` the next ``nbytes`` bytes that start at a multiple of ``align`` bytes."""
        offset = -(-self._end // align) * align
        self._end = offset + nbytes
        return Extent(self._name, tensor, offset, length=nbytes)

    def once(self, key: Hashable, write: Callable[[], T]) -> T:
        """Call ``write`` for the first call with ``key``, and return that result for every call with it.

        Graphs that share this file, such as those for prefill and decode, store a tensor once under its key.
        """
        if key not in self._once:
            self._once[key] = write()
        result: T = self._once[key]
        return result

    def holds(self, extent: Extent) -> bool:
        """Return whether this build, or an earlier one that was killed, has written ``extent``."""
        return self._journal.holds(extent)

    def write(self, extents: Sequence[Extent], blocks: Iterable[Block]) -> None:
        """Fill ``extents`` from the top: each of ``blocks`` computes the next rows, as one array per extent.

        Nothing is computed for a plan, or where an earlier build has written all extents. At most ``jobs`` + 1 blocks
        and their results are in memory at a time.

        Raises:
            ValueError: the blocks give more or fewer bytes than the extents have.
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
    """The state of one tensor that is being written: the next byte, and the sha256 so far."""

    def __init__(self, handle: int, extent: Extent) -> None:
        self.extent = extent
        self._handle = handle
        self._next = extent.offset
        self._end = extent.offset + extent.length
        self._digest: hashlib._Hash | None = hashlib.sha256()

    def write(self, rows: Rows | Columns) -> None:
        if isinstance(rows, Columns):
            return self._write_columns(rows)
        data = memoryview(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
        if self._next + len(data) > self._end:
            raise ValueError(f"{self.extent.tensor}: more bytes than its shape says")
        if self._digest is None:
            raise ValueError(f"{self.extent.tensor}: rows after columns")
        self._digest.update(data)
        self._write_at(self._next, data)
        self._next += len(data)
        return None

    def _write_at(self, offset: int, data: memoryview) -> None:
        """Write all of ``data``; one call of the system may write less."""
        while data:
            written = os.pwrite(self._handle, data, offset)
            offset += written
            data = data[written:]

    def _write_columns(self, columns: Columns) -> None:
        data = np.ascontiguousarray(columns.values).view(np.uint8)
        row_bytes = self.extent.length // len(data)
        if self._next + data.nbytes > self._end or columns.start + data.shape[1] > row_bytes:
            raise ValueError(f"{self.extent.tensor}: more bytes than its shape says")
        for row, line in enumerate(data):
            self._write_at(self.extent.offset + row * row_bytes + columns.start, memoryview(line))
        self._next += data.nbytes
        self._digest = None  # columns do not arrive in the order of the file's bytes

    def close(self) -> str:
        """Return the sha256 of the tensor's bytes.

        Raises:
            ValueError: some of the tensor's bytes were not written.
        """
        if self._next != self._end:
            raise ValueError(f"{self.extent.tensor}: {self._end - self._next} bytes missing")
        if self._digest:
            return self._digest.hexdigest()
        return sha256_range(self._handle, self.extent.offset, self.extent.length)


def in_order(calls: Iterable[Callable[[], T]], jobs: int) -> Iterator[T]:
    """Yield the results of ``calls`` in their order, computed by ``jobs`` threads at most ``jobs`` calls ahead."""
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
