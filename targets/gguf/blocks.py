"""Rows of a matrix as blocks of GGUF: the integers of a build as they are, and Q6_K, which this target rounds itself.

Source of the layouts: ggml's ggml-common.h and ggml-quants.c. Everything is little-endian.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from h1export.model.falcon_h1.states import Array
from h1export.quantize.quantized_tensor import QuantizedTensor

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.int8]
Scales = npt.NDArray[np.float16]

BLOCK = 32  # columns of a block of Q4_0 and of Q8_0
HALF = BLOCK // 2
SUPER = 256  # columns of a block of Q6_K
SUB = 16  # columns that share a scale in it
LOWEST, HIGHEST = -32, 31  # codes of Q6_K
MOST = 127  # the largest scale of SUB columns, in units of the block's


def scales_with_multiplier(tensor: QuantizedTensor) -> Scales:
    """Return scales x row scales in fp16 [rows, columns / 32], which is where GGUF has µP.

    Raises:
        OverflowError: one is too large for fp16, or too small.
    """
    columns = tensor.codes.shape[1]
    exact = tensor.scales.astype(np.float64) * tensor.row_scale.astype(np.float64)[:, None]
    with np.errstate(over="ignore", under="ignore"):
        rounded = exact.astype(np.float16)
    if not (np.isfinite(rounded).all() and (rounded != 0).all()):
        raise OverflowError(f"scales from {exact.min():.3g} to {exact.max():.3g} do not fit fp16")
    return np.repeat(rounded, columns // BLOCK // tensor.scales.shape[1], axis=1)


def q4_0(codes: Codes, scales: Scales) -> Bytes:
    """Pack codes int8 [rows, columns] in [-8, 7] with scales [rows, columns / 32].

    A block is its scale and 16 bytes: byte i has column i in its low half, and column 16 + i in its high half, as
    code + 8.
    """
    rows = len(codes)
    raised = (codes + np.int8(8)).view(np.uint8).reshape(rows, -1, 2, HALF)
    packed = raised[:, :, 0] | (raised[:, :, 1] << np.uint8(4))
    return _joined(scales, packed)


def q8_0(codes: Codes, scales: Scales) -> Bytes:
    """Pack codes int8 [rows, columns] with scales [rows, columns / 32]: a block is its scale and 32 codes."""
    return _joined(scales, codes.reshape(len(codes), -1, BLOCK).view(np.uint8))


def q4_0_parts(rows: Bytes) -> tuple[Codes, Scales]:
    """Return the codes and scales that ``q4_0`` has packed."""
    scales, packed = _split(rows, HALF)
    codes = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(rows), -1).view(np.int8) - np.int8(8)
    return codes, scales


def q8_0_parts(rows: Bytes) -> tuple[Codes, Scales]:
    """Return the codes and scales that ``q8_0`` has packed."""
    scales, codes = _split(rows, BLOCK)
    return codes.reshape(len(rows), -1).view(np.int8), scales


def q6_k_fields(rows: Bytes) -> tuple[Codes, Codes, Scales]:
    """Return what ``packed_q6_k`` has packed: codes, the integers of 16 columns, and d."""
    parts = rows.reshape(len(rows), -1, 210)
    lows, highs = parts[:, :, :128].reshape(*parts.shape[:2], 2, 2, 32), parts[:, :, 128:192]
    highs = highs.reshape(*parts.shape[:2], 2, 32)
    low = np.concatenate([lows & 15, lows >> 4], axis=3)
    high = np.stack([(highs >> shift) & 3 for shift in (0, 2, 4, 6)], axis=3)
    codes = (low | (high << 4)).view(np.int8).reshape(*parts.shape[:2], SUPER) + np.int8(LOWEST)
    units = np.ascontiguousarray(parts[:, :, 192:208]).view(np.int8)
    return codes, units, np.ascontiguousarray(parts[:, :, 208:]).view(np.float16)[:, :, 0]


def _joined(scales: Scales, packed: Bytes) -> Bytes:
    halves = np.ascontiguousarray(scales).view(np.uint8).reshape(*scales.shape, 2)
    return np.concatenate([halves, packed], axis=2).reshape(len(scales), -1)


def _split(rows: Bytes, length: int) -> tuple[Scales, Bytes]:
    blocks = rows.reshape(len(rows), -1, 2 + length)
    return np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[:, :, 0], blocks[:, :, 2:]


def q6_k(weight: Array) -> Bytes:
    """Round a weight float32 [rows, columns] to the nearest codes of Q6_K, and pack them.

    weight = d x scale x code: d is fp16 and shared by 256 columns, ``scale`` is int8 and shared by 16, and codes are in
    [-32, 31]. A scale is the smallest for which no weight of its columns is clipped, rounded up, and its sign gives the
    column of the largest magnitude the code -32, so that no weight is off by more than half a step of its columns.

    Raises:
        OverflowError: a weight is too large for d in fp16.
    """
    groups = weight.astype(np.float64).reshape(len(weight), -1, SUPER // SUB, SUB)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=3)[..., None], axis=3)[..., 0]
    sign = np.where(largest > 0, -1.0, 1.0)
    opposite = (groups * sign[..., None]).max(axis=3)  # the largest of the other sign, or a negative number
    step = np.maximum(np.abs(largest) / -LOWEST, opposite / HIGHEST)
    d = _rounded_up(step.max(axis=2) / MOST)
    unit = np.where(d > 0, d.astype(np.float64), 1.0)[..., None]
    scale = sign * np.minimum(np.ceil(step / unit * (1 - 1e-12)), MOST)
    found = groups / np.where(scale == 0, 1.0, scale * unit)[..., None]
    codes = np.where(scale[..., None] == 0, 0, np.clip(np.rint(found), LOWEST, HIGHEST)).astype(np.int8)
    return packed_q6_k(codes.reshape(*codes.shape[:2], SUPER), scale.astype(np.int8), d)


def _rounded_up(values: npt.NDArray[np.float64]) -> Scales:
    """Return the smallest fp16 numbers that are not below ``values``."""
    with np.errstate(over="ignore"):
        found = values.astype(np.float16)
    if not np.isfinite(found).all():
        raise OverflowError(f"weights up to {values.max() * MOST * HIGHEST:.3g} do not fit blocks of Q6_K")
    return np.where(found.astype(np.float64) < values, np.nextafter(found, np.float16(np.inf)), found)


def packed_q6_k(codes: Codes, scales: Codes, d: Scales) -> Bytes:
    """Pack codes [rows, blocks, 256], scales [rows, blocks, 16] and d [rows, blocks].

    The low 4 bits of column 128 h + 32 q + i are in byte 64 h + 32 (q mod 2) + i, in the half q / 2; its high 2 bits
    are in byte 32 h + i of the next 64 bytes, at bit 2 q.
    """
    quarters = (codes - np.int8(LOWEST)).view(np.uint8).reshape(*codes.shape[:2], 2, 4, 32)
    low = quarters & 15
    high = quarters >> 4
    lows = low[:, :, :, :2] | (low[:, :, :, 2:] << np.uint8(4))
    highs = high[:, :, :, 0] | (high[:, :, :, 1] << 2) | (high[:, :, :, 2] << 4) | (high[:, :, :, 3] << 6)
    flat = (*codes.shape[:2], -1)
    parts = [lows.reshape(flat), highs.reshape(flat), scales.view(np.uint8), d[..., None].view(np.uint8)]
    return np.concatenate(parts, axis=2).reshape(len(codes), -1)
