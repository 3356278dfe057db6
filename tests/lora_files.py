"""Writes a LoRA adapter in PEFT's layout, without PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from h1export.model.falcon_h1.config import FalconH1Config


def write_adapter(checkpoint: Path, folder: Path) -> Path:
    """Write a random adapter of in_proj and lm_head of ``checkpoint`` into ``folder``, and return it."""
    config = FalconH1Config.load(checkpoint)
    torch.manual_seed(0)
    shapes = {
        "model.layers.0.mamba.in_proj": (sum(config.in_proj_parts), config.hidden_size),
        "lm_head": (config.vocab_size, config.hidden_size),
    }
    tensors = {}
    for module, (rows, columns) in shapes.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = 0.2 * torch.randn(4, columns)
        tensors[f"base_model.model.{module}.lora_B.weight"] = 0.2 * torch.randn(rows, 4)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    return folder
