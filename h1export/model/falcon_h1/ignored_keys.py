"""Decides which keys of a config.json change nothing in the model, and which of them a user should hear of.

transformers' ``FalconH1Config`` keeps every key that it does not know as an attribute that nothing reads. Such a key is
ignored here too, and told by name. The few that transformers' own machinery reads are judged by their value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from h1export.model.config_reader import ConfigReader, shown
from h1export.model.falcon_h1.rope import READ, SECTIONS, rope_section

# Keys that transformers writes or published checkpoints have, and why they change nothing. They are not told.
IGNORED_KEYS: Mapping[str, str] = {
    "_name_or_path": "where the checkpoint was once stored",
    "_attn_implementation_autoset": "a transformers run-time switch",
    "architectures": "model_type decides",
    "chunk_size_feed_forward": "FalconH1 never reads it",
    "compression_config": "an older name of quantization_config",
    "is_encoder_decoder": "FalconH1 has no encoder, and never reads it",
    "label2id": "for classifiers only",
    "mamba_dt_init_floor": "initialisation only",
    "mamba_dt_max": "initialisation only",
    "mamba_dt_min": "initialisation only",
    "mlp_expansion_factor": "intermediate_size decides",
    "output_attentions": "a transformers run-time switch",
    "problem_type": "for classifiers only",
    "quantization_config": "how weights are stored, which changes nothing in the model: packed_formats.py reads it",
    "return_dict": "a transformers run-time switch",
    "time_step_floor": "initialisation only",
    "time_step_max": "initialisation only",
    "time_step_min": "initialisation only",
    "transformers_version": "information only",
}


def _nothing(value: Any) -> bool:
    return value is None or value == {}


# torch's floating-point types in which transformers can make a model
DTYPES = frozenset({"float16", "half", "bfloat16", "float32", "float", "float64", "double"})


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_dtype(value: Any) -> bool:
    name = value.get("", "float32") if isinstance(value, dict) else value  # an object has one for each part of a model
    return isinstance(name, str) and name in DTYPES


def _is_labels(value: Any) -> bool:
    return isinstance(value, dict) and all(re.fullmatch(r"[+-]?\d{1,18}", str(key).strip()) for key in value)


def _is_switch_of_layers(value: Any) -> bool:
    return (
        type(value) in (bool, int)
        or value == {}
        or (isinstance(value, list) and all(type(layer) is int for layer in value))
    )


# Keys that change nothing in the model, and whose values transformers uses before it has one: what is expected, and a
# check. With any other value it raises: the file is damaged, or was made for something else.
KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "attention_dropout": ("a number", _is_number),
    "dtype": ("the name of a floating-point type, such as 'bfloat16'", _is_dtype),
    "id2label": ("an object of numbers and labels", _is_labels),
    "initializer_range": ("a number", _is_number),
    "num_logits_to_keep": ("a whole number", lambda value: type(value) is int),
    "output_hidden_states": ("true or false", _is_switch_of_layers),
    "torch_dtype": ("the name of a floating-point type, such as 'bfloat16'", _is_dtype),
    "use_cache": ("true or false", lambda value: type(value) is bool),
}


# Keys that say something about the architecture and that transformers ignores -> the values that say what is exported.
STATED: Mapping[str, Callable[[Any, ConfigReader], bool]] = {
    "attn_layer_indices": lambda value, read: _nothing(value) or value == list(range(_layers(read))),
    "mamba_use_mlp": lambda value, _: value is None or value is True,
}
# Keys that transformers' machinery reads, whatever the model -> what they would do.
CONSEQUENCES: Mapping[str, str] = {
    "auto_map": "asks for code from the checkpoint; h1export never runs remote code: remove the key",
    "fusion_config": "asks transformers to rewrite the model; remove the key and export what was trained",
    "is_causal": "makes attention look ahead; only true can be exported",
    "per_layer_config": "gives layers settings of their own; only one setting for all layers can be exported",
    "text_config": "puts the language model inside another one; give a checkpoint of the language model alone",
    "transformers_weights": "names another file of weights; store the weights as model.safetensors and remove the key",
}
_ALLOWED: Mapping[str, tuple[Any, ...]] = {
    "fusion_config": (False, 0, []),
    "is_causal": (True,),
    "transformers_weights": ("model.safetensors",),
}
_LAYER_KINDS = ("layers_block_type", "layer_types")
JUDGED_KEYS = frozenset({*STATED, *CONSEQUENCES, *_LAYER_KINDS, *KINDS})
MOST_NAMES = 12
MOST_CHARACTERS = 40


def refuse_other_models(read: ConfigReader) -> None:
    """Refuse keys whose values make another model of the checkpoint than the one that is exported.

    Raises:
        H1ExportError: such a key.
    """
    for key, consequence in CONSEQUENCES.items():
        value = read.config.get(key)
        fine = any(type(value) is type(allowed) and value == allowed for allowed in _ALLOWED.get(key, ()))
        fine = (
            fine or (key == "auto_map" and not _asks_for_code(value)) or (key == "per_layer_config" and _empty(value))
        )
        if not (_nothing(value) or fine):
            what, _, next_step = consequence.partition("; ")
            raise read.error(key, f"is {shown(value)}, which {what}", next_step)
    for key, (expected, fits) in KINDS.items():
        value = read.config.get(key)
        unread = key == "torch_dtype" and read.config.get("dtype") is not None
        if value is not None and not unread and not fits(value):
            raise read.error(key, f"is {shown(value)}", f"expected {expected}, or no such key")
    for key in _LAYER_KINDS:
        kinds = read.config.get(key)
        if not _nothing(kinds) and kinds != ["hybrid"] * _layers(read):
            raise read.error(
                key, f"is {shown(kinds)}", "expected 'hybrid' once for every layer; no other kind can be exported"
            )


def ignored_keys(config: Mapping[str, Any], used: frozenset[str]) -> tuple[str, ...]:
    """Return the names of the keys that were ignored and that nobody expects to be, sorted; ``used`` are read.

    A key inside RoPE's section is named ``section.key``.
    """
    read = ConfigReader(config, "config.json")
    names = {key for key in config if key not in used | IGNORED_KEYS.keys() | JUDGED_KEYS}
    names |= {key for key, says_so in STATED.items() if key in config and not says_so(config[key], read)}
    name, section = rope_section(config)
    names |= {f"{name}.{key}" for key in section if key not in READ}
    names |= {other for other in SECTIONS if other != name and config.get(other)}
    return tuple(sorted(names))


def told(names: tuple[str, ...], most: int = MOST_NAMES) -> str:
    """Return ``names`` as one short text, of at most ``most`` names; foreign names are neither long nor many."""
    shortened = [name if len(name) <= MOST_CHARACTERS else f"{name[:MOST_CHARACTERS]}..." for name in names]
    rest = len(names) - most
    return ", ".join(shortened[:most]) + (f" and {rest} more" if rest > 0 else "")


def _asks_for_code(auto_map: Any) -> bool:
    """Return whether an auto_map names a class for a model or its config; transformers looks for no others here."""
    return isinstance(auto_map, dict) and any(str(key).startswith(("AutoModel", "AutoConfig")) for key in auto_map)


def _empty(per_layer_config: Any) -> bool:
    """Return whether a per_layer_config changes nothing in any layer."""
    return isinstance(per_layer_config, dict) and all(_nothing(changes) for changes in per_layer_config.values())


def _layers(read: ConfigReader) -> int:
    return read.size("num_hidden_layers", 32, limit=1024)
