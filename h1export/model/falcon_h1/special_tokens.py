"""SpecialTokens: the tokens that begin, end and pad a text, by generation_config.json or else by config.json."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from h1export.errors import H1ExportError
from h1export.forms import read_bytes
from h1export.model.config_reader import ConfigReader
from h1export.model.falcon_h1.config import FalconH1Config

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids; None or an empty tuple where the model has no such token."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None


def special_tokens(folder: Path, model_config: FalconH1Config) -> SpecialTokens:
    """Returns the special tokens for a checkpoint or artifact in ``folder``.

    Raises:
        H1ExportError: a generation_config.json that is not an object, or whose token ids are not ids.
    """
    path = folder / GENERATION_CONFIG
    if not os.path.lexists(path):
        return SpecialTokens(model_config.bos_token_id, model_config.eos_token_ids, model_config.pad_token_id)
    config = generation_config(folder)
    read = ConfigReader({key: value for key, value in config.items() if value is not None}, path)

    def one(key: str, default: int | None) -> int | None:
        return read.token_id(key, 0) if key in read.config else default

    eos = read.token_ids("eos_token_id", 0) if "eos_token_id" in read.config else model_config.eos_token_ids
    return SpecialTokens(
        one("bos_token_id", model_config.bos_token_id), eos, one("pad_token_id", model_config.pad_token_id)
    )


def generation_config(folder: Path) -> dict[str, Any]:
    """Return generation_config.json of ``folder``; empty where there is none.

    Raises:
        H1ExportError: the file cannot be read, or is no object.
    """
    path = folder / GENERATION_CONFIG
    if not os.path.lexists(path):
        return {}
    try:
        config = json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise H1ExportError(path, "not a JSON object", "download it again, or delete it")
    return config
