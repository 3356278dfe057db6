"""The external data file of an ONNX model: places in a WeightFile, as ONNX tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import onnx_ir as ir

from h1export.artifact.journal import Extent
from h1export.artifact.weight_file import Block, WeightFile

# tensors of SMALL bytes and more start on a page, so that runtimes can map them
SMALL = 1 << 16
PAGE = 4096


class ExternalData(WeightFile):
    """A WeightFile whose places are initializers."""

    def place(self, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.ExternalTensor:
        """Reserve the next place for a tensor."""
        nbytes = int(prod(shape) * dtype.itemsize)
        extent = self.reserve(name, nbytes, PAGE if nbytes >= SMALL else 64)
        return self._external(name, dtype, shape, offset=extent.offset, nbytes=nbytes)

    def alias(self, name: str, shape: tuple[int, ...], of: ir.ExternalTensor, *, start: int = 0) -> ir.ExternalTensor:
        """Bytes of another tensor, from its byte ``start``, under a name and a shape of their own."""
        return self._external(
            name, of.dtype, shape, offset=(of.offset or 0) + start, nbytes=int(prod(shape) * of.dtype.itemsize)
        )

    def fill(self, tensors: Sequence[ir.ExternalTensor], blocks: Iterable[Block]) -> None:
        """``write`` for tensors instead of extents."""
        self.write(
            [
                Extent(self._name, tensor.name or "", tensor.offset or 0, length=tensor.length or 0)
                for tensor in tensors
            ],
            blocks,
        )

    def _external(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], *, offset: int, nbytes: int
    ) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            self._name, offset, nbytes, dtype, shape=ir.Shape(shape), name=name, base_dir=self._stage.folder
        )
