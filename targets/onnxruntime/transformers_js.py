"""What transformers.js reads beside the graph: config.json, tokenizer_config.json and generation_config.json.

It parses them with JavaScript's JSON, which has no Infinity and no NaN; fills in no defaults of config.json; takes the
chat template from tokenizer_config.json alone; and pads on the right where that file does not say otherwise. Source:
src/configs.js, src/tokenization_utils.js and src/models/session.js of @huggingface/transformers 4.3.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from h1export.checkpoint.chat_template import DEFAULT, KEY, ChatTemplate
from h1export.checkpoint.tokenizer import TOKENIZER, TOKENIZER_CONFIG
from h1export.errors import H1ExportError
from h1export.model.config_reader import CONFIG, read_config
from h1export.model.falcon_h1.config import MODEL_TYPE, FalconH1Config
from h1export.model.falcon_h1.special_tokens import GENERATION_CONFIG, generation_config
from h1export.targets.onnxruntime import readme
from h1export.targets.onnxruntime.options import OrtOptions

CUSTOM = "transformers.js_config"
# Keys that name a kind for each layer: transformers.js knows "mamba" and "attention", and not "hybrid".
LAYER_KINDS = ("layers_block_type", "layer_types")
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def write(folder: Path, config: FalconH1Config, options: OrtOptions, *, dtype: str) -> None:
    """Replace the client's files of ``folder``, which has those of the checkpoint; ``dtype`` is its precision's name.

    Raises:
        H1ExportError: generation_config.json has a number that JavaScript's JSON cannot say.
    """
    _replace(folder / CONFIG, _config(folder, config, dtype))
    if generation := generation_config(folder):
        _replace(folder / GENERATION_CONFIG, generation)
    has_tokenizer = (folder / TOKENIZER).is_file()
    if has_tokenizer:
        _replace(folder / TOKENIZER_CONFIG, _tokenizer_config(folder))
    readme.write_transformers_js(folder, options, dtype=dtype, has_tokenizer=has_tokenizer)


def _config(folder: Path, config: FalconH1Config, dtype: str) -> dict[str, Any]:
    path = folder / CONFIG
    before = read_config(path) if path.exists() else {}  # the lowering before a calibration has an empty folder
    eos = list(config.eos_token_ids)
    return {
        **{key: _finite(value) for key, value in before.items() if key not in LAYER_KINDS},
        "model_type": MODEL_TYPE,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_token_id,
        CUSTOM: {"dtype": dtype, "use_external_data_format": 1},
    }


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_CONFIG
    config: dict[str, Any] = read_config(path) if path.exists() else {}
    chat = ChatTemplate.read(folder)
    found: dict[str, Any] = {**{name: chat.tokens[name] for name in TOKENS if name in chat.tokens}, **config}
    if chat.templates:
        named = [{"name": name, "template": text} for name, text in sorted(chat.templates.items())]
        found[KEY] = chat.templates[DEFAULT] if list(chat.templates) == [DEFAULT] else named
    return {**{key: _finite(value) for key, value in found.items()}, "padding_side": "left"}


def _finite(value: Any) -> Any:
    """Return ``value`` with Infinity and NaN as transformers 5 writes them."""
    if isinstance(value, float) and not math.isfinite(value):
        name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return {"__float__": name}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return value


def _replace(path: Path, content: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
    except ValueError:
        what = "has a number that is not finite, which JavaScript cannot read"
        raise H1ExportError(path.name, what, "correct the checkpoint's file, or leave out --layout") from None
    path.write_text(text + "\n", encoding="utf-8")
