"""Reads the base of the rotary embeddings, and refuses what would scale them.

transformers takes ``rope_scaling`` where it says something, else ``rope_parameters``; the base in either goes before
``rope_theta`` at the top level. Source: ``RotaryEmbeddingConfigMixin`` of transformers' ``modeling_rope_utils.py``, and
``FalconH1RotaryEmbedding``, whose "default" kind reads the base alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from h1export.model.config_reader import ConfigReader, shown

DEFAULT_THETA = 10000.0
SECTIONS = ("rope_scaling", "rope_parameters")  # in transformers' order
DICTIONARY = SECTIONS[1]  # transformers checks its type; of the other, anything that is false says nothing
DEFAULT = "default"
# kinds that leave every frequency alone where the factor is 1, and those whose factor is 1 where there is none
SCALED_BY_FACTOR = ("linear", "yarn", "llama3", "longrope", "proportional")
ONE_BY_DEFAULT = ("proportional",)
READ = frozenset({"rope_type", "type", "rope_theta"})


def rope_section(config: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the name and the value of the section that counts; ("", {}) where there is none or it says nothing."""
    return next(((name, config.get(name)) for name in SECTIONS if config.get(name)), ("", {}))


def rope_theta(read: ConfigReader) -> float:
    """Return RoPE's base.

    Raises:
        H1ExportError: a section that is no object, a base that is not a positive number, or a RoPE that is scaled.
    """
    name, section = rope_section(read.config)
    if read.config.get(DICTIONARY) is not None and not isinstance(read.config[DICTIONARY], dict):
        raise read.error(DICTIONARY, f"is {shown(read.config[DICTIONARY])}", "expected an object")
    if not isinstance(section, dict):
        raise read.error(name, f"is {shown(section)}", "expected an object")
    inner = ConfigReader(section, f"{read.where}: {name}")
    _refuse_scaling(inner)
    if section.get("rope_theta") is not None:
        return inner.positive("rope_theta", DEFAULT_THETA)
    return read.positive("rope_theta", DEFAULT_THETA)


def _refuse_scaling(inner: ConfigReader) -> None:
    section = inner.config
    if "hybrid" in section:  # the kind of every layer: transformers reads it as a section of its own
        raise inner.error("hybrid", "is a section of one kind of layer", "give the values for all layers instead")
    key = "rope_type" if "rope_type" in section else "type"
    kind = section.get(key, DEFAULT)
    if kind is None or kind == DEFAULT:
        return
    factor = section.get("factor", 1.0 if kind in ONE_BY_DEFAULT else None)
    if kind not in SCALED_BY_FACTOR or not _says_one(factor):
        what = f"is {shown(kind)}" + (f" with factor {shown(section['factor'])}" if "factor" in section else "")
        raise inner.error(key, what, f"RoPE scaling is not exported; only rope_type {DEFAULT!r}, or a factor of 1, is")
    for name in ("short_factor", "long_factor") if kind == "longrope" else ():
        factors = section.get(name)
        if not isinstance(factors, list) or not all(map(_says_one, factors)):
            raise inner.error(name, f"is {shown(factors)}", "RoPE scaling is not exported; only factors of 1 are")
    for name in ("attention_factor", "partial_rotary_factor"):
        if section.get(name) is not None and not _says_one(section[name]):
            raise inner.error(name, f"is {shown(section[name])}", "RoPE scaling is not exported; only 1.0 is")


def _says_one(value: Any) -> bool:
    return type(value) in (int, float) and value == 1
