"""Scaled dot product attention (MIL specification: transformers)."""

from __future__ import annotations

import numpy as np
import torch

from h1export.targets.coreml.evaluator.dtypes import Array, tensor
from h1export.targets.coreml.evaluator.ops.base import OpError, Table, computes, require_floats


def scaled_dot_product_attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    """Compute softmax(query key^T / sqrt(E) + mask) value in float32.

    Args:
        query: [B, *, L, E].
        key: [B, *, S, E]; the leading sizes of all three are equal, because nothing broadcasts.
        value: [B, *, S, EV].
        attn_mask: broadcasts to [B, *, L, S]; bool (True takes part) or float (added to the scores).

    Returns:
        [B, *, L, EV]; a row whose columns are all masked is NaN.
    """
    if (
        not query.ndim == key.ndim == value.ndim
        or query.ndim < 3
        or not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    ):
        raise OpError(
            f"takes query {query.shape}, key {key.shape}, value {value.shape}, "
            "which must agree in rank and leading sizes"
        )
    scores = (tensor(require_floats(query)) * query.shape[-1] ** -0.5) @ tensor(key).mT
    if attn_mask is not None:
        added = np.where(attn_mask, np.float32(0), np.float32(-np.inf)) if attn_mask.dtype == np.bool_ else attn_mask
        scores = scores + tensor(added)
    return (torch.softmax(scores, -1) @ tensor(value)).numpy()


TABLE: Table = {"scaled_dot_product_attention": computes(scaled_dot_product_attention)}
