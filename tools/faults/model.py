"""A Falcon-H1 checkpoint of one layer with random weights, with which a build takes about a second."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from h1export.checkpoint.resolve import embedded_model
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import tensor_shapes

SMALLER = {
    "num_hidden_layers": 1,
    "hidden_size": 128,
    "intermediate_size": 128,
    "mamba_d_ssm": 128,
    "mamba_n_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "mamba_n_groups": 1,  # MLX takes no more
}
OTHERS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def make(folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint into the new folder ``folder``; the same seed gives the same bytes."""
    source = embedded_model()
    folder.mkdir()
    config = json.loads((source / "config.json").read_text("utf-8")) | SMALLER
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    for name in OTHERS:
        shutil.copyfile(source / name, folder / name)
    numbers = np.random.default_rng(seed)
    shapes = tensor_shapes(FalconH1Config.load(folder))
    weights = {name: numbers.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
