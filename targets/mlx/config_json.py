"""The config.json of an mlx-lm folder.

mlx-lm's defaults are not transformers', and it reads ``rope_theta`` at the top level only, so every value is written
out. Nothing else of the checkpoint's config.json is kept: mlx-lm would obey keys that transformers does not know.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from h1export.model.config_reader import CONFIG
from h1export.model.falcon_h1.config import MODEL_TYPE, SILU, FalconH1Config
from h1export.targets.mlx.options import Compute

TORCH_DTYPES: Mapping[Compute, str] = {"fp16": "float16", "fp32": "float32", "bf16": "bfloat16"}


def config_json(config: FalconH1Config, compute: Compute, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of config.json; ``quantization`` is empty where nothing is in integers."""
    found: dict[str, Any] = dataclasses.asdict(config)
    eos = found.pop("eos_token_ids")
    low, high = found.pop("time_step_limit")
    found |= {
        "architectures": ["FalconH1ForCausalLM"],
        "dtype": TORCH_DTYPES[compute],
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
        "hidden_act": SILU[0],
        "model_type": MODEL_TYPE,
        "time_step_limit": [low, {"__float__": "Infinity"} if math.isinf(high) else high],
    }
    return found | ({"quantization": dict(quantization)} if quantization else {})


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Write config.json into ``folder``."""
    (folder / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
