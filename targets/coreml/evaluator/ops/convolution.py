"""Convolution in one to three dimensions, and pooling (MIL specification: conv and pool)."""

from __future__ import annotations

import numpy as np
from torch.nn import functional as F

from h1export.targets.coreml.evaluator.dtypes import Array, tensor
from h1export.targets.coreml.evaluator.ops.base import Ints, OpError, Table, computes, require_floats

CONVS = (F.conv1d, F.conv2d, F.conv3d)


def _padding(pad_type: str, pad: Ints | None, kernel: Ints, *, strides: Ints) -> Ints:
    """Return the elements before and after each spatial axis.

    ``same`` is supported only where all readings of the specification agree: with stride 1, and as many elements before
    as after.
    """
    spatial = len(kernel)
    if pad_type == "valid":
        return (0,) * 2 * spatial
    if pad_type == "custom":
        if pad is None or len(pad) != 2 * spatial or min(pad) < 0:
            raise OpError(f"has pad {pad} for {spatial} spatial axes")
        return pad
    if pad_type in ("same", "same_lower"):
        if any(size % 2 == 0 for size in kernel) or any(stride != 1 for stride in strides):
            raise OpError(
                f"has pad_type {pad_type!r} with kernel {kernel} and strides {strides}: give the padding as custom"
            )
        return tuple(size // 2 for size in kernel for _ in range(2))
    raise OpError(f"has pad_type {pad_type!r}, which the specification does not have")


def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Array:
    """Convolve x [n, C_in, *D] with weight [C_out, C_in / groups, *K], and add bias [C_out]."""
    spatial = x.ndim - 2
    if not 1 <= spatial <= 3 or weight.ndim != x.ndim:
        raise OpError(f"takes x {x.shape} and weight {weight.shape}")
    strides = strides or (1,) * spatial
    dilations = dilations or (1,) * spatial
    kernel = tuple((size - 1) * dilation + 1 for size, dilation in zip(weight.shape[2:], dilations, strict=True))
    padding = _padding(pad_type, pad, kernel, strides=strides)
    if any(padding):
        x = np.pad(x, [(0, 0), (0, 0), *zip(padding[::2], padding[1::2], strict=True)])
    result = CONVS[spatial - 1](
        tensor(require_floats(x)), tensor(weight), None if bias is None else tensor(bias), strides, 0, dilations, groups
    )
    return result.numpy()


def _windows(
    x: Array, kernel_sizes: Ints, strides: Ints | None, *, pad_type: str, pad: Ints | None, ceil_mode: bool, fill: float
) -> Array:
    """Return the windows of x on new last axes; the elements outside x are ``fill``."""
    spatial = len(kernel_sizes)
    if ceil_mode or x.ndim != spatial + 2:
        raise OpError(
            f"takes x {x.shape} for kernel {kernel_sizes}, ceil_mode {ceil_mode}, which the evaluator does not support"
        )
    strides = strides or (1,) * spatial
    padding = _padding(pad_type, pad, kernel_sizes, strides=strides)
    x = np.pad(
        require_floats(x), [(0, 0), (0, 0), *zip(padding[::2], padding[1::2], strict=True)], constant_values=fill
    )
    axes = tuple(range(2, x.ndim))
    return np.lib.stride_tricks.sliding_window_view(x, kernel_sizes, axes)[
        :, :, *(slice(None, None, step) for step in strides)
    ]


def max_pool(
    x: Array,
    kernel_sizes: Ints,
    pad_type: str,
    strides: Ints | None = None,
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Array:
    """Return the largest element of each window of x [n, C, *D]; padding is never the largest."""
    windows = _windows(x, kernel_sizes, strides, pad_type=pad_type, pad=pad, ceil_mode=ceil_mode, fill=-np.inf)
    return windows.max(tuple(range(x.ndim, windows.ndim)))  # type: ignore[no-any-return]


def avg_pool(
    x: Array,
    kernel_sizes: Ints,
    pad_type: str,
    strides: Ints | None = None,
    pad: Ints | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Array:
    """Return the mean of each window of x [n, C, *D]; padding counts as zeros, or not at all."""
    windows = _windows(
        x,
        kernel_sizes,
        strides,
        pad_type=pad_type,
        pad=pad,
        ceil_mode=ceil_mode,
        fill=np.nan if exclude_padding_from_average else 0.0,
    )
    axes = tuple(range(x.ndim, windows.ndim))
    if not exclude_padding_from_average:
        mean: Array = windows.mean(axes, dtype=np.float32)
        return mean
    if np.isnan(x).any():
        raise OpError("takes NaN, which the evaluator does not support without padding in the average")
    average: Array = np.nanmean(windows, axes)
    return average


TABLE: Table = {"conv": computes(conv), "max_pool": computes(max_pool), "avg_pool": computes(avg_pool)}
