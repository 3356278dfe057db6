"""Checkpoints that mlx-lm can compute: 32 states a head, as Metal's kernel needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

STATES = {"mamba_d_state": 32}


@pytest.fixture(scope="session")
def spoken(make_spoken: Callable[..., Path]) -> Path:
    """The plain model with a tokenizer of a token a byte; read-only."""
    return make_spoken(**STATES)
