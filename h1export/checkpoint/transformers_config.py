"""The config.json and generation_config.json of a folder as objects of transformers, which do nothing of their own.

Both files may come from a stranger, and transformers takes more from them than values: code for attention from the Hub
(``attn_implementation``), another file in their place (``configuration_files``), classes (``auto_map``), and attributes
that replace methods. Keys of these kinds are left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from h1export.errors import MOST_REASON, H1ExportError, shortened
from h1export.model.config_reader import CONFIG, read_config
from h1export.model.falcon_h1.special_tokens import GENERATION_CONFIG, generation_config

COMPARE = "compare it with the published one"
# keys with which transformers loads or does something; those that begin with "_" are left out too
ACTS = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "configuration_files",
        "custom_generate",
        "distributed_config",
        "experts_implementation",
        "fusion_config",
        "kernel_config",
        "quantization_config",
        "transformers_weights",
        "trust_remote_code",
        "use_kernels",
    }
)


def plain_config(folder: Path) -> Any:
    """Return transformers' FalconH1Config of config.json in ``folder``; attention is transformers' own choice.

    Raises:
        H1ExportError: the file cannot be read, or transformers refuses its values.
    """
    from transformers import FalconH1Config

    path = folder / CONFIG
    kind: Any = FalconH1Config
    found = read_config(path)
    if not isinstance(found, dict):
        raise H1ExportError(path, "not a JSON object", COMPARE)
    try:
        with TemporaryDirectory(prefix="h1export-config-") as plain:  # transformers reads its own spelling of infinity
            Path(plain, CONFIG).write_text(json.dumps(_values(found, kind)), encoding="utf-8")
            return kind.from_pretrained(plain, local_files_only=True)
    except Exception as error:  # of any library below transformers
        raise _refused(path, error) from None


def plain_generation_config(folder: Path) -> Any:
    """Return transformers' GenerationConfig of the file in ``folder``, or None where there is none.

    Keys that are no options of `generate` are left out.

    Raises:
        H1ExportError: the file cannot be read, or transformers refuses its values.
    """
    from transformers import GenerationConfig

    path = folder / GENERATION_CONFIG
    if not os.path.lexists(path):
        return None
    kind: Any = GenerationConfig
    known = vars(kind())
    values = {name: value for name, value in _values(generation_config(folder), kind).items() if name in known}
    try:
        return kind.from_dict(values)
    except Exception as error:  # of any library below transformers
        raise _refused(path, error) from None


def _values(found: Mapping[str, Any], kind: type[Any]) -> dict[str, Any]:
    """Return what ``found`` has without keys that act, and without those that would replace a method of ``kind``."""
    return {
        name: value
        for name, value in found.items()
        if name not in ACTS and not name.startswith("_") and not _is_fixed(getattr(kind, name, None))
    }


def _is_fixed(attribute: object) -> bool:
    return callable(attribute) or (isinstance(attribute, property) and attribute.fset is None)


def _refused(path: Path, error: Exception) -> H1ExportError:
    what = shortened(" ".join(str(error).split()) or type(error).__name__, MOST_REASON)
    return H1ExportError(path, f"transformers cannot use it ({what})", COMPARE)
