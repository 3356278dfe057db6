"""Scales of every float16 there is: each of the 65,536 is read as IEEE 754 says, in every kernel of a product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from h1export.targets.onnxruntime.emit.packing import NBitsLayout

RunOp = Callable[..., list[Any]]
BLOCKS = 4  # of a row: the places that a scale may have in a vector
# every half in one of the places, beside halves of other kinds
EVERY = np.random.default_rng(0).permutation(np.arange(1 << 16, dtype=np.uint16)).view(np.float16).reshape(-1, BLOCKS)


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("repeats", [1, 3], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_half(run_op: RunOp, bits: int, block: int, repeats: int, *, level: int) -> None:
    """Token i has ones in block i alone, and every code is 1: its product is the scale of that block times ``block``.

    A product with an infinite or NaN scale is no finite number; it does not reach another row.
    """
    scales = EVERY
    layout = NBitsLayout(bits, block, BLOCKS * block)
    codes = layout.pack(np.ones((len(scales), layout.columns), np.int8))
    x = np.tile(np.repeat(np.eye(BLOCKS, dtype=np.float32), block, axis=1), (repeats, 1))
    attributes = {"K": layout.columns, "N": len(scales), "bits": bits, "block_size": block, "accuracy_level": level}
    (y,) = run_op("QMatMul", {"x": x, "codes": codes, "scales": scales, "factors": None, "bias": None}, **attributes)
    finite = np.isfinite(scales).all(axis=1)
    assert finite.sum() >= len(scales) * 3 // 4
    expected = np.tile(scales[finite].astype(np.float64).T * block, (repeats, 1))
    np.testing.assert_allclose(y[:, finite], expected, rtol=1e-6, atol=0)
    broken = ~np.isfinite(np.tile(scales.T, (repeats, 1)))
    assert not np.isfinite(y[broken]).any()


@pytest.mark.parametrize("scale", [2.0**-24, 2.0**-15, 2.0**-14, 0.0, -0.0, -(2.0**-24), -1.0, 65504.0])
def test_one_scale(run_op: RunOp, scale: float) -> None:
    """2^-24 is not 2^-15, 0 is 0, and a negative scale keeps its sign."""
    layout = NBitsLayout(4, 32, 32)
    codes = layout.pack(np.ones((1, 32), np.int8))
    attributes = {"K": 32, "N": 1, "bits": 4, "block_size": 32, "accuracy_level": 0}
    feeds = {"x": np.ones((1, 32), np.float32), "codes": codes, "scales": np.array([[scale]], np.float16)}
    (y,) = run_op("QMatMul", feeds | {"factors": None, "bias": None}, **attributes)
    assert y[0, 0] == 32 * scale
