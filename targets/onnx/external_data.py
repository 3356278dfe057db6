"""ExternalData: the external data file of an ONNX model, a WeightFile whose extents are ONNX tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from pathlib import PurePosixPath

import onnx_ir as ir

from h1export.artifact.journal import Extent
from h1export.artifact.weight_file import Block, WeightFile

# tensors of SMALL bytes and more start on a page, so that runtimes can map them
SMALL = 1 << 16
PAGE = 4096


class ExternalData(WeightFile):
    """A WeightFile of initializers, beside the graph that they belong to, whatever folder the two are in."""

    def place(self, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.ExternalTensor:
        """Reserve the next bytes of the file for a tensor."""
        nbytes = int(prod(shape) * dtype.itemsize)
        extent = self.reserve(name, nbytes, PAGE if nbytes >= SMALL else 64)
        return self._external(name, dtype, shape, offset=extent.offset, nbytes=nbytes)

    def alias(self, name: str, shape: tuple[int, ...], of: ir.ExternalTensor, *, start: int = 0) -> ir.ExternalTensor:
        """Return a tensor over the bytes of tensor ``of``, from its byte ``start`` on, with its own name and shape."""
        return self._external(
            name, of.dtype, shape, offset=(of.offset or 0) + start, nbytes=int(prod(shape) * of.dtype.itemsize)
        )

    def fill(self, tensors: Sequence[ir.ExternalTensor], blocks: Iterable[Block]) -> None:
        """Fill ``tensors`` as ``write`` fills extents."""
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
        path = PurePosixPath(self._name)
        place = self._stage.folder / path.parent
        return ir.ExternalTensor(path.name, offset, nbytes, dtype, shape=ir.Shape(shape), name=name, base_dir=place)
