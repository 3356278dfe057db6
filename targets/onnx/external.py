"""The external data file of an ONNX model, written tensor by tensor, row block by row block."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Hashable
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

SMALL, PAGE = 1 << 16, 4096  # tensors of SMALL bytes and more start on a page, so that runtimes can map them

T = TypeVar("T")


class TensorSink:
    """The place of one tensor in the file; rows go in from the top."""

    def __init__(self, handle: int, tensor: ir.ExternalTensor, nbytes: int) -> None:
        self.tensor = tensor
        self._handle = handle
        self._next, self._end = tensor.offset or 0, (tensor.offset or 0) + nbytes

    def write(self, rows: npt.NDArray[Any]) -> None:
        """Append the bytes of ``rows``. Raises ValueError beyond the end, OSError when the disk is full."""
        data = memoryview(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
        if self._next + len(data) > self._end:
            raise ValueError(f"{self.tensor.name}: more bytes than its shape says")
        while data:
            written = os.pwrite(self._handle, data, self._next)
            self._next += written
            data = data[written:]

    def write_columns(self, columns: npt.NDArray[Any], first: int) -> None:
        """Put ``columns`` [rows, n] beside those before: item ``first`` of each of the tensor's rows, counted in items of ``columns``.

        Raises ValueError beyond the end, OSError when the disk is full. Every column goes in once, in any order, and nothing by ``write``.
        """
        data = np.ascontiguousarray(columns).view(np.uint8)
        if self._next + data.nbytes > self._end:
            raise ValueError(f"{self.tensor.name}: more bytes than its shape says")
        begin, row_bytes = self.tensor.offset or 0, (self.tensor.length or 0) // len(data)
        for row, line in enumerate(data):
            if os.pwrite(self._handle, line, begin + row * row_bytes + first * columns.itemsize) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.tensor.name)
        self._next += data.nbytes

    def close(self) -> ir.ExternalTensor:
        """The finished tensor. Raises ValueError where bytes are missing."""
        if self._next != self._end:
            raise ValueError(f"{self.tensor.name}: {self._end - self._next} bytes missing")
        return self.tensor


class ExternalData:
    """Creates ``path`` and hands out places in it, one after the other."""

    def __init__(self, path: Path) -> None:
        self._path, self._end = path, 0
        self._once: dict[Hashable, Any] = {}
        self._handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)

    def __enter__(self) -> ExternalData:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._handle)

    def sink(self, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> TensorSink:
        """Reserve the next place for a tensor."""
        nbytes = prod(shape) * dtype.itemsize
        align = PAGE if nbytes >= SMALL else 64
        offset = -(-self._end // align) * align
        self._end = int(offset + nbytes)
        return TensorSink(self._handle, self._external(name, dtype, shape, offset, int(nbytes)), int(nbytes))

    def once(self, key: Hashable, write: Callable[[], T]) -> T:
        """What ``write()`` returned the first time: graphs that share this file share their tensors."""
        if key not in self._once:
            self._once[key] = write()
        return self._once[key]  # type: ignore[no-any-return]

    def alias(self, name: str, shape: tuple[int, ...], of: ir.ExternalTensor, start: int = 0) -> ir.ExternalTensor:
        """Bytes of another tensor, from its byte ``start``, under a name and a shape of their own."""
        return self._external(name, of.dtype, shape, (of.offset or 0) + start, int(prod(shape) * of.dtype.itemsize))

    def _external(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], offset: int, nbytes: int) -> ir.ExternalTensor:
        return ir.ExternalTensor(self._path.name, offset, nbytes, dtype, shape=ir.Shape(shape), name=name, base_dir=self._path.parent)
