"""Keys and values in int8 in a graph of ONNX's own operators: the rows of int8_rows.py, encoded and decoded.

Both are functions of the model, Encode and Decode in int8_rows.DOMAIN, which a runtime expands; in float32 arithmetic
(float32_graph.py) they are left out.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from h1export.targets.onnx.builder import FunctionBuilder, GraphBuilder, Value
from h1export.targets.onnxruntime.int8_rows import BLOCK, DOMAIN, LEAST, NOT_A_NUMBER, SCALE_BYTES, TOP

OPSETS = {"": 23}
MANTISSA = 256  # what a scale's mantissa counts in
BIAS = 127  # of the exponent
# 2^(exponent - 127) by the exponent; nothing is read as a number where it is 0 or 255
POWERS = np.array([0.0, *(2.0 ** (exponent - BIAS) for exponent in range(1, 255)), math.nan], np.float32)


def appended(
    b: GraphBuilder, new: Value, past: Value, *, past_length: Value, total: Value, heads: int, dim: int
) -> tuple[Value, Value, Value]:
    """Append new keys or values to a cache in int8; return (present, new numbers, past numbers).

    Numbers are what is read of the rows, in the shapes that GroupQueryAttention takes.

    Args:
        b: The graph under construction.
        new: float32 [batch, seq, heads * dim].
        past: int8 [batch, heads, rows, width]; rows behind ``total`` stay where they are.
        past_length: int64 [1], the rows of ``past`` that are used.
        total: int64 [1], ``past_length`` and the new tokens.
        heads: The number of heads.
        dim: The numbers of a row.
    """
    encode = b.once(("Encode", dim), lambda: encode_function(dim))
    decode = b.once(("Decode", dim), lambda: decode_function(dim))
    by_head = b.op("Transpose", b.op("Reshape", new, b.ints(0, 0, heads, dim)), perm=[0, 2, 1, 3])
    rows = b.call(encode, by_head)
    used = b.op("Slice", past, b.ints(0), past_length, b.ints(2))
    behind = b.op("Slice", past, total, b.ints(np.iinfo(np.int64).max), b.ints(2))
    present = b.op("Concat", used, rows, behind, axis=2)
    by_token = b.op("Transpose", b.call(decode, rows), perm=[0, 2, 1, 3])
    return present, b.op("Reshape", by_token, b.ints(0, 0, heads * dim)), b.call(decode, used)


def encode_function(dim: int) -> ir.Function:
    """Return the function float32 [batch, heads, tokens, dim] -> int8 [batch, heads, tokens, width]."""
    b = FunctionBuilder(OPSETS)
    numbers = ir.Value(name="numbers")
    blocks = b.op("Reshape", numbers, b.ints(0, 0, 0, dim // BLOCK, BLOCK))
    zeros = b.op("ReduceSum", b.op("Mul", blocks, _number(b, 0)), b.ints(4))  # NaN where a number is not finite
    finite = b.op("Not", b.op("IsNaN", zeros))
    largest = b.op("Where", finite, b.op("ReduceMax", b.op("Abs", blocks), b.ints(4)), _number(b, 1))
    bits = _scale_bits(b, b.op("Div", largest, _number(b, TOP)))
    used = b.op("And", finite, b.op("GreaterOrEqual", bits, _integer(b, LEAST)))
    bits = b.op("Where", used, bits, b.op("Where", finite, _integer(b, 0), _integer(b, NOT_A_NUMBER)))
    exponent = b.op("Div", bits, _integer(b, MANTISSA))
    mantissa = b.op("Mod", bits, _integer(b, MANTISSA))
    scale = b.op("Where", used, _scale(b, exponent, mantissa), _number(b, 1))
    codes = b.op("Round", b.op("Div", b.op("Where", used, blocks, _number(b, 0)), scale))
    unsigned = b.op("Concat", mantissa, exponent, axis=4)
    above = b.op("Greater", unsigned, _integer(b, np.iinfo(np.int8).max))
    signed = b.op("Where", above, b.op("Sub", unsigned, _integer(b, MANTISSA)), unsigned)
    parts = (
        b.op("Reshape", b.op("Cast", part, to=int(ir.DataType.INT8)), b.ints(0, 0, 0, size))
        for part, size in ((codes, dim), (signed, dim // BLOCK * SCALE_BYTES))
    )
    return b.function(DOMAIN, "Encode", given=numbers, result=b.op("Concat", *parts, axis=3))


def decode_function(dim: int) -> ir.Function:
    """Return the function int8 [batch, heads, tokens, width] -> float32 [batch, heads, tokens, dim]."""
    b = FunctionBuilder(OPSETS)
    rows = ir.Value(name="rows")
    blocks = dim // BLOCK
    codes, scales = b.ops("Split", 2, rows, b.ints(dim, blocks * SCALE_BYTES), axis=3)
    by_block = b.op("Reshape", scales, b.ints(0, 0, 0, blocks, SCALE_BYTES))
    unsigned = b.op("Mod", b.op("Cast", by_block, to=int(ir.DataType.INT32)), _integer(b, MANTISSA))
    mantissa, exponent = b.ops("Split", 2, unsigned, b.ints(1, 1), axis=4)
    whole = b.op("Cast", codes, to=int(ir.DataType.FLOAT))
    numbers = b.op("Mul", b.op("Reshape", whole, b.ints(0, 0, 0, blocks, BLOCK)), _scale(b, exponent, mantissa))
    return b.function(DOMAIN, "Decode", given=rows, result=b.op("Reshape", numbers, b.ints(0, 0, 0, dim)))


def _scale_bits(b: GraphBuilder, scale: Value) -> Value:
    """Return the bits, int32, of the nearest scale to a positive float32; below LEAST for one that is too small.

    A logarithm is off by little, so that its exponent is one of two neighbours: comparisons say which.
    """
    normal = b.op("Max", scale, _number(b, POWERS[1]))
    guess = b.op("Floor", b.op("Mul", b.op("Log", normal), _number(b, 1 / math.log(2))))
    guess = b.op("Clip", b.op("Add", guess, _number(b, BIAS)), _number(b, 1), _number(b, 253))
    power = _power(b, b.op("Cast", guess, to=int(ir.DataType.INT32)))
    above = b.op("GreaterOrEqual", normal, b.op("Add", power, power))
    below = b.op("Less", normal, power)
    steps = (b.op("Cast", side, to=int(ir.DataType.FLOAT)) for side in (above, below))
    exponent = b.op("Sub", b.op("Add", guess, next(steps)), next(steps))
    power = _power(b, b.op("Cast", exponent, to=int(ir.DataType.INT32)))
    # every step is exact, and a mantissa that is rounded up to 256 is the next exponent's 0
    above_power = b.op("Sub", b.op("Div", normal, power), _number(b, 1))
    mantissa = b.op("Floor", b.op("Add", b.op("Mul", above_power, _number(b, MANTISSA)), _number(b, 0.5)))
    bits = b.op("Add", b.op("Mul", exponent, _number(b, MANTISSA)), mantissa)
    return b.op("Cast", bits, to=int(ir.DataType.INT32))


def _scale(b: GraphBuilder, exponent: Value, mantissa: Value) -> Value:
    """Return the scale of an exponent of 0 to 255 and a mantissa of 0 to 255, int32."""
    part = b.op("Mul", b.op("Cast", mantissa, to=int(ir.DataType.FLOAT)), _number(b, 1 / MANTISSA))
    return b.op("Mul", _power(b, exponent), b.op("Add", part, _number(b, 1)))


def _power(b: GraphBuilder, exponent: Value) -> Value:
    return b.op("Gather", b.constant(POWERS, np.float32), exponent)


def _number(b: GraphBuilder, value: Any) -> Value:
    return b.constant(value, np.float32)


def _integer(b: GraphBuilder, value: int) -> Value:
    return b.constant(value, np.int32)
