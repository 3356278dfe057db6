"""A Falcon-H1 that trains in a second."""

from __future__ import annotations

import pytest
from proxy import model
from transformers import FalconH1Config


@pytest.fixture
def cfg() -> FalconH1Config:
    settings = model.config().to_dict() | {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    }
    return FalconH1Config(**settings)
