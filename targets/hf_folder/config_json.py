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
    config = {key: value for key, value in read_config(folder / CONFIG).items() if key not in dropped}
    text = json.dumps({**config, **changes}, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
