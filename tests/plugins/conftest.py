"""Random inputs of the three ops, and the error measure of all op tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

Inputs = dict[str, Any]


@pytest.fixture(scope="session")
def error() -> Callable[..., float]:
    """error(actual, expected, magnitude=None): the largest deviation, over the largest ``magnitude``.

    ``magnitude`` is the result if no term cancelled another, which is the scale on which rounding acts. By default it
    is the expected values themselves.
    """

    def measure(actual: torch.Tensor, expected: npt.NDArray[Any], magnitude: npt.NDArray[Any] | None = None) -> float:
        assert tuple(actual.shape) == expected.shape
        scale = np.abs(expected if magnitude is None else magnitude).max()
        return float(np.abs(actual.double().numpy() - expected).max() / scale)

    return measure


@pytest.fixture(scope="session")
def scan_inputs() -> Callable[..., Inputs]:
    """Keyword arguments of ssm_scan; ``pads`` has the pads of the first rows, and further rows have none."""

    def make(
        batch: int = 2,
        seq: int = 13,
        groups: int = 2,
        heads_per_group: int = 3,
        d_head: int = 3,
        d_state: int = 5,
        chunk_size: int = 4,
        limits: tuple[float, float] = (0.0, math.inf),
        pads: Sequence[int] = (),
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Inputs:
        heads = groups * heads_per_group
        normal = _normal(seed)
        return {
            "x": normal(batch, seq, heads, d_head).to(dtype),
            "dt": normal(batch, seq, heads).to(dtype),
            "A": -torch.exp(normal(heads) * 0.7 + 1),
            "B": normal(batch, seq, groups, d_state).to(dtype),
            "C": normal(batch, seq, groups, d_state).to(dtype),
            "D": normal(heads),
            "dt_bias": normal(heads) * 1.5 - 2,
            "state": normal(batch, heads, d_head, d_state),
            "mask": _left_padded(batch, seq, pads).float(),
            "chunk_size": chunk_size,
            "dt_min": limits[0],
            "dt_max": limits[1],
        }

    return make


@pytest.fixture(scope="session")
def conv_inputs() -> Callable[..., Inputs]:
    """Keyword arguments of causal_conv; padded positions are zero, and so is the state before them."""

    def make(
        batch: int = 2,
        seq: int = 9,
        channels: int = 6,
        taps: int = 4,
        bias: bool = True,
        pads: Sequence[int] = (),
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Inputs:
        normal = _normal(seed)
        real = _left_padded(batch, seq, pads)
        inputs = {
            "x": normal(batch, seq, channels) * real[..., None],
            "state": normal(batch, channels, taps - 1) * real.all(1)[:, None, None],
            "weight": normal(channels, 1, taps),
            "bias": normal(channels) if bias else None,
        }
        return {name: None if value is None else value.to(dtype) for name, value in inputs.items()}

    return make


@pytest.fixture(scope="session")
def attention_inputs() -> Callable[..., Inputs]:
    """Keyword arguments of attention.

    ``pads`` count from the first past column, and ``first_position`` is the position of that column.
    """

    def make(
        batch: int = 2,
        seq: int = 5,
        past: int = 4,
        kv_heads: int = 2,
        heads_per_kv: int = 2,
        dim: int = 8,
        first_position: int = 0,
        rope_theta: float = 1e4,
        pads: Sequence[int] = (),
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Inputs:
        normal = _normal(seed)
        mask = _left_padded(batch, past + seq, pads)
        return {
            "q": normal(batch, seq, kv_heads * heads_per_kv, dim).to(dtype),
            "k": normal(batch, seq, kv_heads, dim).to(dtype),
            "v": normal(batch, seq, kv_heads, dim).to(dtype),
            "past_k": normal(batch, kv_heads, past, dim).to(dtype),
            "past_v": normal(batch, kv_heads, past, dim).to(dtype),
            "positions": first_position + (mask.cumsum(1) - 1).clamp(min=0)[:, past:],
            "mask": mask,
            "rope_theta": rope_theta,
        }

    return make


def _normal(seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(*size, generator=generator)


def _left_padded(batch: int, columns: int, pads: Sequence[int]) -> torch.Tensor:
    """int64 [batch, columns]; a row with more pads than columns has no real token."""
    count = torch.tensor([*pads[:batch], *[0] * (batch - len(pads[:batch]))])
    return (torch.arange(columns)[None] >= count[:, None]).long()
