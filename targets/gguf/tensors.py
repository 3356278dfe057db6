"""The tensors of the file: their names, types and shapes, and where their bytes come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from h1export.artifact.manifest import StoredPart, StoredWeight
from h1export.artifact.weight_file import BLOCK_BYTES, Block
from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.weight_expr import Multiplier, WeightExpr
from h1export.errors import H1ExportError
from h1export.graphs.program import Program
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.projections import FINAL_NORM
from h1export.model.falcon_h1.states import Array
from h1export.model.falcon_h1.tensors import EMBEDDING, LM_HEAD, projection_of
from h1export.quantize.grid import OwnTensor, PackedRows
from h1export.quantize.methods.grid_search import round_own_rows
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.quantize.source import HasPackedRows, QuantizedBlock, QuantizedWeights, quantized_blocks
from h1export.targets.gguf import blocks, names
from h1export.targets.gguf.grids import FORMATS
from h1export.targets.gguf.mix import SHARED, mixed
from h1export.targets.gguf.options import GgufOptions
from h1export.targets.gguf.types import OF_CHOICE, TensorType, integer_type

# Integers that this target rounds itself, where an option asks for a type that the build does not have.
OWN = {
    TensorType.Q4_0: Precision(4, 32),
    TensorType.Q4_K: Precision(4, 32),
    TensorType.Q5_0: Precision(5, 32),
    TensorType.Q5_K: Precision(5, 32),
    TensorType.Q6_K: Precision(6, 256),
    TensorType.Q8_0: Precision(8, 32),
}
PACK: dict[TensorType, Callable[[blocks.Codes, blocks.Scales], blocks.Bytes]] = {
    TensorType.Q4_0: blocks.q4_0,
    TensorType.Q8_0: blocks.q8_0,
}
FLOATS: dict[TensorType, Any] = {
    TensorType.F32: np.float32,
    TensorType.F16: np.float16,
    TensorType.BF16: ml_dtypes.bfloat16,
}


FP16_MAX = float(np.finfo(np.float16).max)


class Source(Enum):
    """Where the bytes of a tensor come from."""

    BUILD = auto()  # the integers that every target stores
    OWN = auto()  # integers that this target rounds from the floats
    SOLVED = auto()  # integers of a format of this target's own that a method may solve in; else it rounds them
    FLOATS = auto()
    ZEROS = auto()  # a bias that the model does not have, and llama.cpp adds unasked


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file.

    Attributes:
        name: its name in the file.
        expr: what it is computed from, µP included; None where it is zeros.
        kind: its type.
        shape: slowest dimension first.
        source: where its bytes come from.
        precision: that of its integers; None where it has none.
    """

    name: str
    expr: WeightExpr | None
    kind: TensorType
    shape: tuple[int, ...]
    source: Source
    precision: Precision | None = None

    @property
    def nbytes(self) -> int:
        """The bytes in the file."""
        return prod(self.shape[:-1]) * self.kind.row_bytes(self.shape[-1])

    def stored(self) -> StoredWeight | None:
        """Return the manifest's entry; None where it has no integers."""
        if self.expr is None or self.precision is None:
            return None
        part = self.expr.only
        stored = StoredPart(part.tensor, self.shape[0], part.multiplier)
        return StoredWeight(self.name, self.precision.bits, self.precision.group_size, axis=0, parts=(stored,))

    def row_blocks(self, store: WeightStore, integers: QuantizedWeights) -> Iterator[Block]:
        """Yield functions that compute the next rows of the file's bytes."""
        if self.expr is None:
            yield lambda: (np.zeros(self.nbytes, np.uint8),)
        elif self.source is Source.BUILD:
            for block in quantized_blocks(self.expr, store, integers, max_bytes=BLOCK_BYTES):
                yield partial(self._packed, block)
        elif self.source is Source.SOLVED:
            tensor = self.expr.only.tensor
            for start, stop in store.row_ranges([tensor], BLOCK_BYTES):
                yield partial(self._solved, store, integers, (start, stop))
        else:
            for rows in self.expr.lazy_blocks(store, BLOCK_BYTES):
                yield partial(self._rounded, rows)

    def _packed(self, block: QuantizedBlock) -> tuple[blocks.Bytes]:
        (tensor,) = block()
        return (self._checked(lambda: _pack(self.kind, tensor)),)

    def own(self, store: WeightStore) -> OwnTensor | None:
        """Return the format that a method may solve it in; None where it has no such format."""
        if self.source is not Source.SOLVED or self.expr is None:
            return None
        return OwnTensor(FORMATS[self.kind], self.expr.only.factors(store))

    def _solved(self, store: WeightStore, integers: QuantizedWeights, rows: tuple[int, int]) -> tuple[PackedRows]:
        assert self.expr is not None
        part = self.expr.only
        found = integers.packed_rows(part.tensor, *rows) if isinstance(integers, HasPackedRows) else None
        if found is None:
            found = round_own_rows(part.rows(store, *rows), FORMATS[self.kind], name=part.tensor)
        return (found,)

    def _rounded(self, rows: Callable[[], Array]) -> tuple[npt.NDArray[Any]]:
        values = rows()
        if self.source is Source.FLOATS:
            return (self._floats(values),)
        if self.kind is TensorType.Q6_K:
            return (self._checked(lambda: blocks.q6_k(values)),)
        ones = np.ones(len(values), np.float32)
        tensor = quantize_rows(values, OWN[self.kind], ones, name=self.name)
        return (self._checked(lambda: _pack(self.kind, tensor)),)

    def _checked(self, pack: Callable[[], blocks.Bytes]) -> blocks.Bytes:
        try:
            return pack()
        except OverflowError as error:
            raise self._error(str(error)) from None

    def _floats(self, values: Array) -> npt.NDArray[Any]:
        largest = float(np.abs(values).max(initial=0.0))
        if self.kind is TensorType.F16 and largest > FP16_MAX:
            raise self._error(f"holds {largest:g}, too large for fp16")
        found: npt.NDArray[Any] = values.astype(FLOATS[self.kind])
        return found

    def _error(self, what: str) -> H1ExportError:
        assert self.expr is not None
        return H1ExportError(f'tensor "{self.expr.only.tensor}"', what, "store it in floats: --quant none --floats f32")


def tensors_of(
    program: Program, store: WeightStore, integers: QuantizedWeights, *, options: GgufOptions
) -> tuple[GgufTensor, ...]:
    """Return the tensors of the file, in its order.

    Raises:
        H1ExportError: integers that GGUF has no place for, or a type that does not fit a tensor.
    """
    layers = program.config.num_hidden_layers
    mix = _mix(program.config, store, integers, options=options)
    found = [
        _tensor(
            _with_multiplier(program.config, expr), program.config, store, integers=integers, options=options, mix=mix
        )
        for expr in program.weights.values()
    ]
    if not program.config.mamba_conv_bias:
        places = [names.place_of(names.conv_bias(layer)) for layer in range(layers)]
        shape = (program.config.conv_dim,)
        found += [GgufTensor(place.name, None, TensorType.F32, shape, source=Source.ZEROS) for place in places]
    return tuple(found)


def _mix(
    config: FalconH1Config, store: WeightStore, integers: QuantizedWeights, *, options: GgufOptions
) -> Mapping[str, TensorType]:
    """Return the types that a mix of llama.cpp's types chooses.

    A tensor that is not in int4, because of a plan of precisions, keeps what it has; an embedding has int8 in any case.

    Raises:
        H1ExportError: a build that is not in int4, or a checkpoint that brings its own integers.
    """
    if options.mix == SHARED:
        return {}
    flag = f"--mix {options.mix}"
    if store.packed_format is not None:
        raise H1ExportError(flag, "rounds weights, and this checkpoint has integers of its own", "leave it out")
    in_int4 = [tensor for tensor, precision in integers.precisions.items() if precision.bits == 4]
    if not in_int4:
        raise H1ExportError(flag, "chooses types of 4 to 6 bits, and the build is not in int4", "use --quant int4")
    replaced = {*in_int4, *(integers.precisions.keys() & {EMBEDDING})}
    return {tensor: kind for tensor, kind in mixed(options.mix, config).items() if tensor in replaced}


def _with_multiplier(config: FalconH1Config, expr: WeightExpr) -> WeightExpr:
    """Return ``expr`` with the multipliers that the graph has beside the embedding, which llama.cpp's has not.

    A tied head is the embedding, its multiplier included, so that the final norm has to divide by it.
    """
    if expr.only.tensor == EMBEDDING:
        return expr.times(Multiplier.scalar(config.embedding_multiplier))
    if expr.only.tensor == FINAL_NORM and config.tie_word_embeddings:
        return expr.times(Multiplier.scalar(1 / config.embedding_multiplier))
    return expr


def _tensor(
    expr: WeightExpr,
    config: FalconH1Config,
    store: WeightStore,
    *,
    integers: QuantizedWeights,
    options: GgufOptions,
    mix: Mapping[str, TensorType],
) -> GgufTensor:
    tensor = expr.only.tensor
    place = names.place_of(tensor)
    shape = place.shape(store.shape(tensor), config)
    if projection_of(tensor) is None:
        return GgufTensor(place.name, expr, TensorType.F32, shape, source=Source.FLOATS)
    if expr.only.sorted:
        what = "has its columns in an order of its own (desc_act), and GGUF has no place for one"
        raise H1ExportError(f'tensor "{tensor}"', what, "give the unquantised checkpoint, or build for --target ort")
    precision = integers.precisions.get(tensor)
    own = tensor in store.packed  # integers that the checkpoint brings are kept
    head = integers.precisions.get(EMBEDDING if config.tie_word_embeddings else LM_HEAD)
    four_bits = head is not None and head.bits == 4 and not own
    kind = _kind(tensor, shape[-1], precision, config=config, options=options, four_bits=four_bits, mix=mix)
    if precision is not None and kind is integer_type(precision):
        return GgufTensor(place.name, expr, kind, shape, source=Source.BUILD, precision=precision)
    if kind in FORMATS and (mix or kind is not TensorType.Q6_K):
        return GgufTensor(place.name, expr, kind, shape, source=Source.SOLVED, precision=OWN[kind])
    if kind.integers:
        return GgufTensor(place.name, expr, kind, shape, source=Source.OWN, precision=OWN[kind])
    return GgufTensor(place.name, expr, kind, shape, source=Source.FLOATS)


def _kind(
    tensor: str,
    columns: int,
    precision: Precision | None,
    *,
    config: FalconH1Config,
    options: GgufOptions,
    four_bits: bool,
    mix: Mapping[str, TensorType],
) -> TensorType:
    """Return the type of a matrix.

    ``four_bits``: the build has its head in int4, and a better type may replace it. ``mix`` has the types of a mix.

    Raises:
        H1ExportError: the type's blocks do not divide the columns.
    """
    chosen = "auto"
    flag = "--quant"
    is_head = tensor == LM_HEAD or (tensor == EMBEDDING and config.tie_word_embeddings)
    is_table = is_head or tensor == EMBEDDING
    if is_table:
        flag = "--head" if is_head and (tensor != EMBEDDING or options.head != "auto") else "--embedding"
        chosen = options.head if flag == "--head" else options.embedding
    if chosen != "auto":
        return _fitting(tensor, columns, OF_CHOICE.get(chosen) or TensorType(chosen), flag=flag)
    if tensor in mix:
        return _fitting(tensor, columns, mix[tensor], flag="--mix")
    if is_table and precision is not None and four_bits and columns % blocks.SUPER == 0:
        return TensorType.Q6_K
    kind = TensorType(options.floats) if precision is None else integer_type(precision)
    return _fitting(tensor, columns, kind, flag=flag)


def _fitting(tensor: str, columns: int, kind: TensorType, *, flag: str) -> TensorType:
    if columns % kind.block.columns:
        what = f"has {columns} columns, which blocks of {kind} ({kind.block.columns} columns) do not divide"
        next_step = "use --quant none --floats f16" if flag == "--quant" else f"use {flag} f16"
        raise H1ExportError(f'tensor "{tensor}"', what, next_step)
    return kind


def _pack(kind: TensorType, tensor: QuantizedTensor) -> blocks.Bytes:
    """Pack integers as blocks. Raises OverflowError where a scale with its multiplier does not fit fp16."""
    return PACK[kind](tensor.codes, blocks.scales_with_multiplier(tensor))
