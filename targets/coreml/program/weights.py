"""Weights of an ML program: stand-ins in its functions, whose bytes are computed when the package is written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from h1export.artifact.manifest import StoredPart, StoredWeight
from h1export.artifact.weight_file import BLOCK_BYTES, Block
from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.weight_expr import WeightExpr, WeightPart
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array
from h1export.model.falcon_h1.tensors import EMBEDDING
from h1export.quantize.choices import AUTO
from h1export.quantize.dequantize import dequantized_blocks
from h1export.quantize.precision import Precision
from h1export.quantize.source import QuantizedBlock, QuantizedWeights, quantized_blocks
from h1export.targets.coreml import sdk
from h1export.targets.coreml.program.blob_storage import OF_ARRAY, BlobStorage, BlobType, pack_int4

Float = type[np.float16] | type[np.float32]
Var = Any  # coremltools' Var, untyped

SCALES = "_scales"
CODES = "_codes"
ZEROS = "_zeros"


def mil_name(expr: WeightExpr) -> str:
    """Return the checkpoint's name of a weight and the functions that made it, without dots."""
    return "_".join((expr.only.tensor, *expr.only.functions)).replace(".", "_")


class Weights:
    """The constants of weights in a function; the bytes are written once, however many functions read them.

    Constants have the shape and dtype of the weight and hold NaN, so that a tool that computes with them gives NaN.

    Attributes:
        store: the checkpoint's tensors.
        compute: the dtype of activations, and so of weights, scales and multipliers.
        stored: quantised weights, for the manifest.
    """

    def __init__(
        self,
        store: WeightStore,
        integers: QuantizedWeights,
        config: FalconH1Config,
        *,
        blobs: BlobStorage,
        compute: Float,
        embedding: str = AUTO,
    ) -> None:
        """``embedding`` is the option; int4 and int8 put integers into an embedding that is not tied."""
        self.compute = compute
        self._gathers_integers = config.tie_word_embeddings or embedding in ("int4", "int8")
        self.stored = list[StoredWeight]()
        self.store = store
        self._integers = integers
        self._blobs = blobs
        self._places: dict[str, Callable[[], int]] = {}

    def precision(self, expr: WeightExpr) -> Precision | None:
        """Return the precision of ``expr``; None: it is stored in floats, as an untied embedding is by default."""
        if expr.only.tensor == EMBEDDING and not self._gathers_integers:
            return None
        return self._integers.precisions.get(expr.only.tensor)

    @property
    def nbytes(self) -> int:
        """The bytes of the checkpoint's tensors."""
        return self.store.nbytes

    def stored_blocks(self, expr: WeightExpr) -> Iterator[Callable[[], Array]]:
        """Return row blocks of what the package stores: its integers, dequantised, or the checkpoint's own floats."""
        return dequantized_blocks(
            expr, self.store, self._integers if self.precision(expr) else None, max_bytes=BLOCK_BYTES
        )

    def dense(self, expr: WeightExpr, shape: tuple[int, ...] | None = None, dtype: Float | None = None) -> Var:
        """Return ``expr``, µP included, in ``shape`` and ``dtype``; by default its own shape and ``compute``."""
        dtype = dtype or self.compute
        own = expr.shape(self.store.shape)
        blocks = (partial(_floats, block, dtype, expr) for block in expr.lazy_blocks(self.store, BLOCK_BYTES))
        return self._constant(mil_name(expr), shape or own, dtype, blocks=blocks)

    def conv_tap(self, expr: WeightExpr, tap: int) -> Var:
        """Return one tap of a convolution's weight [channels, 1, taps], [channels]."""

        def block() -> tuple[npt.NDArray[np.floating[Any]]]:
            return _floats(lambda: expr.dense(self.store)[:, 0, tap], self.compute, expr)

        return self._constant(
            f"{mil_name(expr)}_{tap}", (expr.shape(self.store.shape)[0],), self.compute, blocks=[block]
        )

    def multiplier(self, part: WeightPart) -> Var | None:
        """Return the µP multiplier beside quantised rows, a scalar or [rows]; None where it is 1."""
        if part.multiplier.is_scalar:
            return None if part.multiplier.factor == 1.0 else self.compute(part.multiplier.factor)
        return part.factors(self.store).astype(self.compute)

    def quantized(self, expr: WeightExpr, precision: Precision) -> Var:
        """Emit (codes - zeros) * scales [rows, columns] of a matrix, without µP, by constexpr_blockwise_shift_scale."""
        name = mil_name(expr)
        (rows, columns) = expr.shape(self.store.shape)
        groups = columns // precision.columns_per_group(columns)
        integer = np.zeros((), sdk.int4() if precision.bits == 4 else np.int8)
        shapes = {
            CODES: (rows, columns),
            SCALES: (rows, groups),
            **({ZEROS: (rows, groups)} if precision.zeros else {}),
        }
        made = {}
        for place, (suffix, shape) in enumerate(shapes.items()):
            made[suffix] = self._stand_in(name + suffix, shape, self.compute(np.nan) if suffix == SCALES else integer)
            self._places[name + suffix] = partial(self._written, expr, precision, groups, place=place)
        offset = {"offset": made[ZEROS]} if precision.zeros else {}
        return sdk.builder().constexpr_blockwise_shift_scale(data=made[CODES], scale=made[SCALES], name=name, **offset)

    def order(self, tensor: str) -> Var:
        """Return the order of a packed tensor's columns, int32 [columns]."""
        return sdk.builder().const(
            val=self.store.packed[tensor].order.astype(np.int32), name=order_name(self.store.order_name(tensor))
        )

    def offset(self, var: Var) -> int | None:
        """Return the offset of a constant's value in weight.bin; None: it is small, and the program itself holds it."""
        if (place := self._places.get(var.name)) is not None:
            return self._blobs.once(var.name, place)
        array = np.asarray(var.val)
        if array.size < 10 or array.dtype not in OF_ARRAY:  # coremltools' own limit
            return None
        key = (array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).hexdigest())
        return self._blobs.once(key, lambda: self._blobs.add_array(var.name, array))

    def _constant(self, name: str, shape: tuple[int, ...], dtype: Float, *, blocks: Iterable[Block]) -> Var:
        self._places[name] = lambda: self._blobs.add([(name, OF_ARRAY[np.dtype(dtype)], shape)], blocks)[0]
        return self._stand_in(name, shape, dtype(np.nan))

    def _stand_in(self, name: str, shape: tuple[int, ...], value: Any) -> Var:
        return sdk.builder().const(val=np.broadcast_to(value, shape), name=name)

    def _written(self, expr: WeightExpr, precision: Precision, groups: int, *, place: int) -> int:
        """Return the offset of codes (0), scales (1) or zero points (2) of ``expr``, all written together and once."""

        def write() -> list[int]:
            name = mil_name(expr)
            (rows, columns) = expr.shape(self.store.shape)
            integer = BlobType.INT4 if precision.bits == 4 else BlobType.INT8
            tensors = [
                (name + CODES, integer, (rows, columns)),
                (name + SCALES, OF_ARRAY[np.dtype(self.compute)], (rows, groups)),
            ]
            if precision.zeros:
                tensors.append((name + ZEROS, integer, (rows, groups)))
            # rows of zero points may end within a byte, and two of them do not
            blocks = quantized_blocks(
                expr, self.store, self._integers, max_bytes=BLOCK_BYTES, multiple=2 if precision.zeros else 1
            )
            offsets = self._blobs.add(tensors, (partial(_integers, block, precision, self.compute) for block in blocks))
            part = StoredPart(
                expr.only.tensor, rows, expr.only.multiplier, order=self.store.order_name(expr.only.tensor)
            )
            self.stored.append(StoredWeight(name, precision.bits, precision.group_size, axis=0, parts=(part,)))
            return offsets

        return self._blobs.once((expr, precision), write)[place]


def order_name(stored: str) -> str:
    """Return the name of the constant that a manifest calls ``stored``."""
    return stored.replace(".", "_")


def _integers(block: QuantizedBlock, precision: Precision, compute: Float) -> tuple[npt.NDArray[Any], ...]:
    (tensor,) = block()
    codes = pack_int4(tensor.codes) if precision.bits == 4 else tensor.codes
    scales = tensor.scales.astype(compute)
    if tensor.zeros is None:
        return codes, scales
    return codes, scales, pack_int4(tensor.zeros.reshape(1, -1)) if precision.bits == 4 else tensor.zeros


def _floats(block: Callable[[], Array], dtype: Float, expr: WeightExpr) -> tuple[npt.NDArray[np.floating[Any]]]:
    """Raises H1ExportError for a value beyond the range of fp16."""
    values = block()
    if dtype is np.float16 and np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
        raise H1ExportError(
            f'tensor "{expr.only.tensor}"', f"holds {np.abs(values).max():g}, too large for fp16", "use --compute fp32"
        )
    return (values.astype(dtype),)
