"""Types of GGUF that no other target has: Q4_K, Q5_K, Q6_K and Q5_0 as formats that methods solve in.

Source of the layouts: ggml's ggml-common.h and ggml-quants.c. Everything is little-endian. A block of 256 columns has
8 groups of 32 with a step and an offset each (Q4_K, Q5_K), or 16 groups of 16 with a step (Q6_K).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from h1export.model.falcon_h1.states import Array
from h1export.quantize.grid import BlockScales, GridFormat, PackedRows
from h1export.targets.gguf.blocks import BLOCK, HALF, LOWEST, SUB, SUPER, packed_q6_k, q6_k_fields
from h1export.targets.gguf.types import BLOCKS, TensorType

Codes = npt.NDArray[np.int8]
GROUPS = SUPER // BLOCK  # groups of a block of Q4_K and Q5_K
HEADER = 16  # bytes of d, of the minimum, and of the groups' integers before their codes
LOW6 = 63  # the largest integer of a group
FOUR = np.uint8(4)
LOW4 = np.uint8(15)


def _pack_q4_k(scales: BlockScales, codes: Codes) -> PackedRows:
    return _joined(_header(scales), _nibbles(codes.view(np.uint8)))


def _unpack_q4_k(rows: PackedRows) -> tuple[BlockScales, Codes]:
    parts = rows.reshape(len(rows), -1, BLOCKS[TensorType.Q4_K].nbytes)
    return _scales(parts), _codes(_of_nibbles(parts[:, :, HEADER:]))


def _pack_q5_k(scales: BlockScales, codes: Codes) -> PackedRows:
    """Bit i of byte j of the 32 bytes before the nibbles is the fifth bit of column 32 i + j."""
    raised = codes.view(np.uint8).reshape(len(codes), -1, GROUPS, BLOCK)
    fifth = np.zeros((*raised.shape[:2], BLOCK), np.uint8)
    for group in range(GROUPS):
        fifth |= (raised[:, :, group] >> FOUR) << np.uint8(group)
    return _joined(_header(scales), fifth, _nibbles(raised & LOW4))


def _unpack_q5_k(rows: PackedRows) -> tuple[BlockScales, Codes]:
    parts = rows.reshape(len(rows), -1, BLOCKS[TensorType.Q5_K].nbytes)
    low = _of_nibbles(parts[:, :, HEADER + BLOCK :])
    fifth = parts[:, :, HEADER : HEADER + BLOCK, None] >> np.arange(GROUPS, dtype=np.uint8) & np.uint8(1)
    return _scales(parts), _codes(low | (fifth.transpose(0, 1, 3, 2).reshape(low.shape) << FOUR))


def _pack_q5_0(scales: BlockScales, codes: Codes) -> PackedRows:
    """A block is d, the fifth bits of its columns in order, and nibbles as in Q4_0."""
    raised = (codes + np.int8(16)).view(np.uint8).reshape(len(codes), -1, BLOCK)
    fifth = np.packbits(raised >> FOUR, axis=2, bitorder="little")
    low = raised & LOW4
    return _joined(_halves(scales.scale), fifth, low[:, :, :HALF] | (low[:, :, HALF:] << FOUR))


def _unpack_q5_0(rows: PackedRows) -> tuple[BlockScales, Codes]:
    parts = rows.reshape(len(rows), -1, BLOCKS[TensorType.Q5_0].nbytes)
    fifth = np.unpackbits(parts[:, :, 2:6], axis=2, bitorder="little")
    nibbles = parts[:, :, 6:]
    codes = _codes(np.concatenate([nibbles & LOW4, nibbles >> FOUR], axis=2) | (fifth << FOUR)) - np.int8(16)
    d = _floats(parts[:, :, :2])
    return BlockScales(d, torch.ones_like(d), torch.zeros_like(d), torch.zeros_like(d)), codes


def _pack_q6_k(scales: BlockScales, codes: Codes) -> PackedRows:
    blocks = codes.reshape(len(codes), -1, SUPER)
    units = scales.units.numpy().astype(np.int8).reshape(*blocks.shape[:2], SUPER // SUB)
    return packed_q6_k(blocks, units, scales.scale.numpy().astype(np.float16))


def _unpack_q6_k(rows: PackedRows) -> tuple[BlockScales, Codes]:
    codes, units, d = q6_k_fields(rows)
    of_blocks = torch.from_numpy(d.astype(np.float32))
    of_groups = torch.from_numpy(units.astype(np.float32)).reshape(len(rows), -1)
    none = (torch.zeros_like(of_blocks), torch.zeros_like(of_groups))
    return BlockScales(of_blocks, of_groups, *none), codes.reshape(len(rows), -1)


def _joined(*parts: PackedRows) -> PackedRows:
    return np.concatenate(parts, axis=2).reshape(len(parts[0]), -1)


def _codes(values: npt.NDArray[np.uint8]) -> Codes:
    return values.reshape(len(values), -1).view(np.int8)


def _halves(values: Tensor) -> PackedRows:
    """Return the bytes of fp16 numbers [rows, blocks] as [rows, blocks, 2]."""
    halves = values.numpy().astype(np.float16)
    return halves[..., None].view(np.uint8)


def _floats(halves: PackedRows) -> Tensor:
    found: Array = np.ascontiguousarray(halves).view(np.float16)[:, :, 0].astype(np.float32)
    return torch.from_numpy(found)


def _nibbles(raised: npt.NDArray[np.uint8]) -> PackedRows:
    """Return 128 bytes a block: byte 32 q + i has column 64 q + i in its low half, and column 64 q + 32 + i above."""
    pairs = raised.reshape(len(raised), -1, GROUPS // 2, 2, BLOCK)
    packed = pairs[:, :, :, 0] | (pairs[:, :, :, 1] << FOUR)
    return packed.reshape(*packed.shape[:2], -1)


def _of_nibbles(packed: PackedRows) -> npt.NDArray[np.uint8]:
    halves = packed.reshape(*packed.shape[:2], GROUPS // 2, 1, BLOCK)
    return np.concatenate([halves & LOW4, halves >> FOUR], axis=3).reshape(*packed.shape[:2], SUPER)


def _header(scales: BlockScales) -> PackedRows:
    """Return d, the minimum, and 16 integers of 6 bits in 12 bytes, of each block.

    Bytes 0 to 3 have the steps of groups 0 to 3 in their low 6 bits, and bytes 4 to 7 the offsets. Bytes 8 to 11 have
    the low 4 bits of the other steps and, above, of the other offsets, whose high 2 bits are above the first eight.
    """
    units, minimums = (
        values.numpy().astype(np.uint8).reshape(len(values), -1, GROUPS)
        for values in (scales.units, scales.minimum_units)
    )
    first = units[:, :, :4] | (units[:, :, 4:] >> FOUR) << np.uint8(6)
    second = minimums[:, :, :4] | (minimums[:, :, 4:] >> FOUR) << np.uint8(6)
    third = (units[:, :, 4:] & LOW4) | (minimums[:, :, 4:] & LOW4) << FOUR
    return np.concatenate([_halves(scales.scale), _halves(scales.minimum), first, second, third], axis=2)


def _scales(parts: PackedRows) -> BlockScales:
    first, second, third = (parts[:, :, start : start + 4] for start in (4, 8, 12))
    units = np.concatenate([first & LOW6, (third & LOW4) | (first >> 6) << FOUR], axis=2)
    minimums = np.concatenate([second & LOW6, (third >> FOUR) | (second >> 6) << FOUR], axis=2)
    of_groups = (torch.from_numpy(values.astype(np.float32)).reshape(len(parts), -1) for values in (units, minimums))
    steps, offsets = of_groups
    return BlockScales(_floats(parts[:, :, :2]), steps, _floats(parts[:, :, 2:4]), offsets)


FORMATS: Mapping[TensorType, GridFormat] = {
    TensorType.Q4_K: GridFormat(
        name="q4_k",
        width=BLOCK,
        groups=GROUPS,
        lowest=0,
        highest=15,
        most=LOW6,
        offsets=True,
        nbytes=BLOCKS[TensorType.Q4_K].nbytes,
        pack=_pack_q4_k,
        unpack=_unpack_q4_k,
    ),
    TensorType.Q5_0: GridFormat(
        name="q5_0",
        width=BLOCK,
        groups=1,
        lowest=-16,
        highest=15,
        most=1,
        offsets=False,
        nbytes=BLOCKS[TensorType.Q5_0].nbytes,
        pack=_pack_q5_0,
        unpack=_unpack_q5_0,
    ),
    TensorType.Q5_K: GridFormat(
        name="q5_k",
        width=BLOCK,
        groups=GROUPS,
        lowest=0,
        highest=31,
        most=LOW6,
        offsets=True,
        nbytes=BLOCKS[TensorType.Q5_K].nbytes,
        pack=_pack_q5_k,
        unpack=_unpack_q5_k,
    ),
    TensorType.Q6_K: GridFormat(
        name="q6_k",
        width=SUB,
        groups=SUPER // SUB,
        lowest=LOWEST,
        highest=-LOWEST - 1,
        most=127,
        offsets=False,
        nbytes=BLOCKS[TensorType.Q6_K].nbytes,
        pack=_pack_q6_k,
        unpack=_unpack_q6_k,
    ),
}


def parts_of(kind: TensorType, rows: PackedRows) -> tuple[Codes, npt.NDArray[np.float16]]:
    """Return codes with the signs of their steps, and steps rounded to positive fp16; offsets are left out."""
    scales, codes = FORMATS[kind].unpack(rows)
    steps = scales.steps.numpy()
    signed = codes.reshape(*steps.shape, -1) * np.sign(steps).astype(np.int8)[..., None]
    sizes = np.maximum(np.abs(steps).astype(np.float16), np.finfo(np.float16).smallest_subnormal)
    return signed.reshape(codes.shape), sizes
