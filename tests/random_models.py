"""Random Falcon-H1 models of many shapes, and ways to quantise them: right artifacts, which no check may fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

VOCABULARIES = (97, 259, 512, 2048)
QUANTS = (("int4", 4), ("int4", 0), ("int8", 4), ("none", 0))  # (precision, accuracy level)
WEIGHTS = (0.75, 0.1, 0.1, 0.05)  # most have what is rounded most


@dataclass(frozen=True)
class Sample:
    """A random model and how it is quantised."""

    config: dict[str, Any]
    seed: int
    quant: str
    accuracy_level: int
    group_size: int


def sample(number: int) -> Sample:
    """Return the model of this number: the same one in every process."""
    rng = np.random.default_rng(number)

    def one(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    head_dim = one(16, 32, 64)
    groups = one(1, 2)
    keys = one(1, 2)
    d_head = one(16, 32)
    heads = groups * one(2, 3)
    biases = one(False, False, True)
    config = {
        "vocab_size": one(*VOCABULARIES),
        "hidden_size": one(32, 64, 128, 256),
        "intermediate_size": one(64, 96, 192, 320),
        "num_hidden_layers": one(1, 1, 2, 3, 4),
        "num_attention_heads": 2 * keys * one(1, 2),
        "num_key_value_heads": keys,
        "head_dim": head_dim,
        "mamba_d_ssm": 32 * heads,
        "mamba_n_heads": 32 * heads // d_head,
        "mamba_d_head": d_head,
        "mamba_n_groups": groups,
        "mamba_d_state": one(16, 32),
        "mamba_d_conv": one(2, 3, 4),
        "mamba_chunk_size": one(7, 16, 32),
        "mamba_rms_norm": one(False, True),
        "mamba_norm_before_gate": one(False, True),
        "attention_bias": biases,
        "mlp_bias": biases,
        "projectors_bias": biases,
        "mamba_proj_bias": biases,
        "tie_word_embeddings": one(False, True),
        "initializer_range": one(0.02, 0.05, 0.08, 0.15),
        "lm_head_multiplier": one(0.05, 0.39, 1.5),
    }
    quant, level = QUANTS[int(rng.choice(len(QUANTS), p=WEIGHTS))]
    attended = config["num_attention_heads"] * head_dim
    widths = [config["hidden_size"], config["intermediate_size"], config["mamba_d_ssm"], attended]
    fitting = [size for size in (32, 64, 128) if all(width % size == 0 for width in widths)]
    return Sample(config, number, quant, accuracy_level=level, group_size=one(*fitting))
