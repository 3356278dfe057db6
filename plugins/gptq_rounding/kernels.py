"""GPTQ's rounding of a block of columns in Triton; the method is quantize/methods/gptq.py's.

A launch takes the place of a loop of about ten small operations a column, whose launches would take far longer than
their work.
"""

import triton
import triton.language as tl

# Added to a float32 below 2^22 and subtracted again, this rounds it to the nearest integer, ties to even.
TO_INTEGER = tl.constexpr(12582912.0)


@triton.jit
def round_columns(
    rest, order, upper, scales, codes, errors, start, count, columns, rows, width, top,
    BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Round columns order[start : start + count] of BR rows, one after the other; count is at most BC.

    rest fp32 [count, rows] has their weights in the order of rounding, and scales are fp32 [groups, rows]. The kernel
    writes codes int8 [columns, rows], in the columns' own order, and errors fp32 [count, rows]. upper fp32 [columns,
    columns] is zero below its diagonal. Grid: (rows / BR rounded up).
    """
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    known = r < rows
    c = tl.arange(0, BC)
    inside = c < count
    tile = tl.load(rest + c[:, None] * rows + r[None, :], mask=inside[:, None] & known[None, :], other=0.0)
    for i in range(count):
        weight = tl.sum(tl.where(c[:, None] == i, tile, 0.0), axis=0)
        column = tl.load(order + start + i)
        line = upper + (start + i) * columns + start
        scale = tl.load(scales + (column // width) * rows + r, mask=known, other=1.0)
        quotient = tl.minimum(tl.maximum(tl.div_rn(weight, scale), -top), top)
        code = (quotient + TO_INTEGER) - TO_INTEGER
        error = tl.div_rn(weight - code * scale, tl.load(line + i))
        tl.store(codes + column * rows + r, code.to(tl.int8), mask=known)
        tl.store(errors + i * rows + r, error, mask=known)
        following = tl.load(line + c, mask=inside, other=0.0)
        tile -= following[:, None] * error[None, :]
