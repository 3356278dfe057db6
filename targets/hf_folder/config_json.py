"""Read and replace the config.json of a stage, which starts as a copy of the checkpoint's."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from h1export.model.config_reader import CONFIG, read_config

# Keys that describe how the checkpoint's own weights are stored, which says nothing about those of the new folder.
STORAGE_KEYS = frozenset({"quantization_config", "compression_config", "quantization"})


def write_config(folder: Path, changes: Mapping[str, Any], dropped: Collection[str] = STORAGE_KEYS) -> None:
    """Replace ``folder/config.json`` by itself without the keys ``dropped``, and with those of ``changes``."""
    path = folder / CONFIG
    before = read_config(path) if path.exists() else {}  # the lowering before a calibration has an empty folder
    config = {key: value for key, value in before.items() if key not in dropped}
    text = json.dumps({**config, **changes}, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
