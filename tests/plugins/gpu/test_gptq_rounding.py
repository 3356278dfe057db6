"""GPTQ's kernel against the loop over columns, under Triton's interpreter and on a GPU; and compiled for sm_90."""

from __future__ import annotations

import pytest
import torch

from h1export.plugins.gptq_rounding.launch import COLUMNS, round_columns
from h1export.quantize.methods.gptq import _round_columns, invert

pytestmark = pytest.mark.trt


@pytest.mark.parametrize(("count", "rows", "width", "top"), [(COLUMNS, 21, 32, 7), (32, 3, 160, 127)])
def test_is_the_loop_over_columns(count: int, rows: int, width: int, top: int, device: torch.device) -> None:
    """Of 160 columns a whole block, and the rest of a block."""
    generator = torch.Generator().manual_seed(0)
    columns = COLUMNS + 32
    start = COLUMNS if count < COLUMNS else 0
    mixed = torch.randn(columns, columns, dtype=torch.float64, generator=generator)
    inverse = invert(mixed.T @ mixed, "x")
    weight = torch.randn(rows, columns, generator=generator)
    scales = (weight.reshape(rows, -1, width).abs().amax(2) / top).half().float().T.contiguous()
    rest = weight.T[inverse.order][start : start + count].contiguous()
    truth = torch.zeros(columns, rows, dtype=torch.int8)
    expected = _round_columns(rest.clone(), inverse, start, scales=scales, width=width, top=top, codes=truth)
    codes = torch.zeros(columns, rows, dtype=torch.int8, device=device)
    errors = torch.empty(count, rows, device=device)
    round_columns(
        rest.to(device),
        inverse.order.int().to(device),
        inverse.upper.contiguous().to(device),
        start=start,
        scales=scales.to(device),
        width=width,
        top=top,
        codes=codes,
        errors=errors,
    )
    assert (codes.cpu() != truth).float().mean() < 1e-3  # a fused multiply-add may decide a tie otherwise
    assert truth.any()
    assert (errors.cpu() - expected).abs().median() < 1e-5 * expected.abs().max()
