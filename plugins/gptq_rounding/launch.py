"""The launch of GPTQ's rounding of a block of columns on a GPU."""

from __future__ import annotations

from torch import Tensor

from h1export.plugins.gpu.kernel import Kernel, Launch, arguments, run

OP = "gptq_rounding"
COLUMNS = 128  # the most columns of a launch, which lie in the registers of a program
ROWS = 16
WARPS = 4
ROUND_COLUMNS = arguments(
    "rest:*fp32 order:*i32 upper:*fp32 scales:*fp32 codes:*i8 errors:*fp32 "
    "start:i32 count:i32 columns:i32 rows:i32 width:i32 top:fp32"
)


def kernel() -> Kernel:
    """Return the one kernel."""
    return Kernel(
        OP,
        "round_columns",
        "fp32",
        arguments=ROUND_COLUMNS,
        constants=(("BC", COLUMNS), ("BR", ROWS)),
        warps=WARPS,
        stages=1,
    )


def round_columns(
    rest: Tensor,
    order: Tensor,
    upper: Tensor,
    *,
    start: int,
    scales: Tensor,
    width: int,
    top: int,
    codes: Tensor,
    errors: Tensor,
) -> None:
    """Round columns ``order[start : start + len(errors)]`` into ``codes``, and write their ``errors``.

    Args:
        rest: float32 [n, rows], the weights of these columns, in the order of rounding; it is not changed.
        order: int32 [columns], the order of rounding.
        upper: float32 [columns, columns], zero below its diagonal.
        start: the place in ``order`` of the first column.
        scales: float32 [groups, rows].
        width: the columns of a group.
        top: the largest code.
        codes: int8 [columns, rows], in the columns' own order.
        errors: float32 [n, rows], n at most COLUMNS: what the later columns have to make up for.

    Raises:
        H1ExportError: Triton is not installed, or a tensor is not contiguous or has another dtype.
    """
    columns, rows = len(order), rest.shape[1]
    tensors = {"rest": rest, "order": order, "upper": upper, "scales": scales, "codes": codes, "errors": errors}
    values = {
        "start": start,
        "count": len(errors),
        "columns": columns,
        "rows": rows,
        "width": width,
        "top": float(top),
    }
    chosen = kernel()
    named = tuple(values.get(name, name) for name, _ in chosen.arguments)
    run([Launch(chosen, (-(-rows // ROWS), 1, 1), named)], tensors)
