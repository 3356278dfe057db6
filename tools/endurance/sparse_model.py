"""A checkpoint whose embedding and lm_head have more than 2^31 elements each, and a small one with some of its rows.

The large file has holes, so that it takes some MB of a disk that can have them. Rows outside ``ROWS`` are zeros. The
small checkpoint is the same model over the vocabulary of ``ROWS``: what it computes for row i is what the large one
computes for row ROWS[i].
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import tensor_shapes

VOCABULARY, HIDDEN = 262_160, 8_224  # 8,520,192 elements more than 2^31; 257 groups of 32 in a row
BORDER = 2**31 // HIDDEN  # the row that element 2^31 is in
RUN = 32  # consecutive rows
ROWS = np.concatenate(
    [
        np.arange(start, start + RUN)
        for start in (0, 2**29 // HIDDEN, 2**30 // HIDDEN - RUN // 2, BORDER - RUN // 2, VOCABULARY - RUN)
    ]
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LARGE = (EMBEDDING, HEAD)
CONFIG: Mapping[str, Any] = {
    "architectures": ["FalconH1ForCausalLM"],
    "model_type": "falcon_h1",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 2,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 16,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "mamba_rms_norm": False,
    "mamba_norm_before_gate": False,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e11},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "embedding_multiplier": 5.65,
    "lm_head_multiplier": 0.39,
    "attention_in_multiplier": 1.1,
    "attention_out_multiplier": 0.9375,
    "key_multiplier": 0.39,
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.47,
    "ssm_multipliers": [0.3535, 0.25, 0.35, 0.5, 0.72],
    "mlp_multipliers": [0.88, 0.59],
}

Bits = npt.NDArray[np.uint16]


def write(large: Path, small: Path) -> None:
    """Make both checkpoints in the folders, which must not exist yet."""
    rng = np.random.default_rng(20261127)
    shapes = tensor_shapes(FalconH1Config.from_config(dict(CONFIG)))
    tensors = {
        name: _values(name, (len(ROWS), HIDDEN) if name in LARGE else shape, rng) for name, shape in shapes.items()
    }
    _write(large, CONFIG, tensors)
    _write(small, {**CONFIG, "vocab_size": len(ROWS)}, tensors)


def _values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Bits:
    """Return random bf16 values in the ranges of trained models, as bits."""
    normal = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("A_log"):
        normal = np.log(1 + 3 * np.abs(normal))
    elif name.endswith("dt_bias"):
        normal = normal - 2
    elif name.endswith((".D", "norm.weight")):
        normal = 1 + 0.2 * normal
    elif name.endswith("conv1d.weight"):
        normal = 0.4 * normal
    else:
        normal = normal / np.float32(shape[-1] ** 0.5)
    return (normal.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Bits]) -> None:
    """Write config.json and model.safetensors; a tensor with fewer rows than its shape has gets them at ``ROWS``."""
    folder.mkdir(parents=True)
    shapes = tensor_shapes(FalconH1Config.from_config(dict(config)))
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        data = file.tell()
        for name, shape in shapes.items():
            begin, values = data + header[name]["data_offsets"][0], tensors[name]
            whole = values.shape == tuple(shape)
            for index, row in enumerate(values[None] if whole else values):
                file.seek(begin if whole else begin + 2 * HIDDEN * int(ROWS[index]))
                file.write(row.tobytes())
        file.truncate(data + end)
