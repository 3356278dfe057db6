"""A released config, and safetensors files made and damaged byte by byte."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from h1export.core.spec import HybridSpec

# The 0.5B instruct model's config.json, key by key as published (multipliers to the digits of the research notes).
RELEASED: Mapping[str, Any] = {
    "architectures": ["FalconH1ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_in_multiplier": 1.0,
    "attention_out_multiplier": 0.9375,
    "attn_layer_indices": None,
    "bos_token_id": 1,
    "embedding_multiplier": 5.65685,
    "eos_token_id": 11,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "key_multiplier": 0.390625,
    "lm_head_multiplier": 0.0390625,
    "mamba_chunk_size": 128,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 64,
    "mamba_d_ssm": 1536,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 24,
    "mamba_norm_before_gate": False,
    "mamba_proj_bias": False,
    "mamba_rms_norm": False,
    "mamba_use_mlp": True,
    "max_position_embeddings": 16384,
    "mlp_bias": False,
    "mlp_expansion_factor": 8,
    "mlp_multipliers": [0.883884, 0.585938],
    "model_type": "falcon_h1",
    "num_attention_heads": 8,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "projectors_bias": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1e11,
    "ssm_in_multiplier": 1.25,
    "ssm_multipliers": [0.353553, 0.25, 0.353553, 0.5, 0.353553],
    "ssm_out_multiplier": 0.235702,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.0.dev0",
    "use_cache": True,
    "vocab_size": 32784,
}


@pytest.fixture
def released() -> dict[str, Any]:
    """The released 0.5B config, to be changed at will."""
    return copy.deepcopy(dict(RELEASED))


@pytest.fixture(scope="session")
def spec_of() -> Callable[..., HybridSpec]:
    """spec_of(key=value, ...) -> the released 0.5B architecture with these keys changed."""
    return lambda **changes: HybridSpec.from_config({**copy.deepcopy(dict(RELEASED)), **changes})


def _write(file: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def _split(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


@pytest.fixture(scope="session")
def write_safetensors() -> Callable[..., Path]:
    """write_safetensors(file, header, data) -> file; ``header`` is a JSON value, or bytes written as they are."""
    return _write


@pytest.fixture(scope="session")
def read_safetensors() -> Callable[[Path], tuple[dict[str, Any], bytes]]:
    """read_safetensors(file) -> its header as JSON values, and its data."""
    return _split


@pytest.fixture(scope="session")
def edit_header() -> Callable[[Path, Callable[[dict[str, Any]], object]], None]:
    """edit_header(file, change) rewrites ``file`` with its header changed in place by ``change``."""

    def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
        header, data = _split(file)
        change(header)
        _write(file, header, data)

    return edit
