"""The external data file of an ONNX model, written tensor by tensor, row block by row block."""

from __future__ import annotations

import errno
import hashlib
import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from h1export.core.journal import READ_BYTES, Extent, Journal
from h1export.core.stage import Stage

SMALL, PAGE = 1 << 16, 4096  # tensors of SMALL bytes and more start on a page, so that runtimes can map them

Rows = npt.NDArray[Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Columns:
    """``values`` [rows, n] that stand beside others in a tensor's rows, ``start`` bytes from the left. In any order, each once."""

    values: Rows
    start: int


Block = Callable[[], Sequence[Rows | Columns]]  # computes the next rows, or some columns, of one or more tensors


class ExternalData:
    """The file ``name`` of ``stage``: hands out places in it, one after the other, and fills them.

    Places depend on nothing but the order of the calls, so a build that goes on after a kill finds its tensors where they were.
    """

    def __init__(self, stage: Stage, name: str) -> None:
        self._stage, self._name, self._end = stage, name, 0
        self._journal = Journal(stage.folder)
        self._once: dict[Hashable, Any] = {}
        self._handle = os.open(stage.folder / name, os.O_CREAT | os.O_RDWR, 0o644)

    def __enter__(self) -> ExternalData:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                os.ftruncate(self._handle, self._end)
        finally:
            os.close(self._handle)

    def place(self, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.ExternalTensor:
        """Reserve the next place for a tensor."""
        nbytes = int(prod(shape) * dtype.itemsize)
        align = PAGE if nbytes >= SMALL else 64
        offset = -(-self._end // align) * align
        self._end = offset + nbytes
        return self._external(name, dtype, shape, offset, nbytes)

    def once(self, key: Hashable, write: Callable[[], T]) -> T:
        """What ``write()`` returned the first time: graphs that share this file share their tensors."""
        if key not in self._once:
            self._once[key] = write()
        return self._once[key]  # type: ignore[no-any-return]

    def alias(self, name: str, shape: tuple[int, ...], of: ir.ExternalTensor, start: int = 0) -> ir.ExternalTensor:
        """Bytes of another tensor, from its byte ``start``, under a name and a shape of their own."""
        return self._external(name, of.dtype, shape, (of.offset or 0) + start, int(prod(shape) * of.dtype.itemsize))

    def fill(self, tensors: Sequence[ir.ExternalTensor], blocks: Iterable[Block]) -> None:
        """Write ``tensors``, whose rows ``blocks`` compute from the top, one array a tensor and block.

        Nothing is computed for a plan, nor where an earlier build wrote the same. Memory holds ``jobs`` blocks and their results.

        Raises:
            ValueError: more or fewer bytes than the shapes say.
            OSError: the disk is full.
        """
        extents = [Extent(self._name, tensor.name or "", tensor.offset or 0, tensor.length or 0) for tensor in tensors]
        if self._stage.dry or all(self._journal.holds(extent) for extent in extents):
            return
        writers = [_Writer(self._handle, extent) for extent in extents]
        for arrays in in_order(blocks, self._stage.jobs):
            for writer, rows in zip(writers, arrays, strict=True):
                writer.write(rows)
        for writer in writers:
            self._journal.add(writer.extent, writer.close())

    def _external(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], offset: int, nbytes: int) -> ir.ExternalTensor:
        return ir.ExternalTensor(self._name, offset, nbytes, dtype, shape=ir.Shape(shape), name=name, base_dir=self._stage.folder)


class _Writer:
    """One tensor on its way into the file."""

    def __init__(self, handle: int, extent: Extent) -> None:
        self.extent = extent
        self._handle, self._next, self._end = handle, extent.offset, extent.offset + extent.length
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
        digest, start = hashlib.sha256(), self.extent.offset
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
