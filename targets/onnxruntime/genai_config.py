"""genai_config.json, so that onnxruntime-genai runs the folder as it is.

Source: onnxruntime-genai's config reference; model type "decoder" takes states by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.special_tokens import SpecialTokens, special_tokens
from h1export.model.falcon_h1.states import ATTENTION_MASK, INPUT_IDS, LOGITS, StateKind, StateSpec, StateTensor
from h1export.targets.onnxruntime.inference_session import SETTINGS
from h1export.targets.onnxruntime.layouts import MODEL
from h1export.targets.onnxruntime.options import OrtOptions
from h1export.targets.onnxruntime.state_layout import StateLayout
from h1export.targets.onnxruntime.variants import FUSED_LEVEL

CONFIG = "genai_config.json"


def write_config(model_config: FalconH1Config, folder: Path, options: OrtOptions, *, states: StateLayout) -> None:
    """Write the config into a folder that carries the checkpoint's generation_config.json where it has one.

    The client reads ``head_size`` as the last size of keys and values, which it allocates; ``states`` says what it is.
    """
    key = next(tensor for tensor in StateSpec.of(model_config).tensors if tensor.kind is StateKind.KEY)
    settings = {"session_options": _session_options(options), "head_size": states.sized(key, 1, 0)[-1]}
    config = {
        "model": _model(model_config, special_tokens(folder, model_config), settings),
        "search": _search(model_config),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _model(model_config: FalconH1Config, tokens: SpecialTokens, settings: dict[str, Any]) -> dict[str, Any]:
    def pattern(side: str, kind: StateKind) -> str:
        name = StateTensor(0, kind, ())
        return (name.past if side == "past" else name.present).replace(".0.", ".%d.")

    # the client wants a pad token; it is never read without padding
    pad = tokens.pad if tokens.pad is not None else next(iter(tokens.eos), 0)
    ids = {"bos_token_id": tokens.bos, "eos_token_id": list(tokens.eos) or None, "pad_token_id": pad}
    return {
        "type": "decoder",
        **{key: value for key, value in ids.items() if value is not None},
        "context_length": model_config.max_position_embeddings,
        "vocab_size": model_config.vocab_size,
        "decoder": {
            "session_options": settings["session_options"],
            "filename": MODEL,
            "head_size": settings["head_size"],
            "hidden_size": model_config.hidden_size,
            "num_attention_heads": model_config.num_attention_heads,
            "num_key_value_heads": model_config.num_key_value_heads,
            "num_hidden_layers": model_config.num_hidden_layers,
            "inputs": {
                "input_ids": INPUT_IDS,
                "attention_mask": ATTENTION_MASK,
                "past_key_names": pattern("past", StateKind.KEY),
                "past_value_names": pattern("past", StateKind.VALUE),
            },
            "outputs": {
                "logits": LOGITS,
                "present_key_names": pattern("present", StateKind.KEY),
                "present_value_names": pattern("present", StateKind.VALUE),
            },
        },
    }


def _session_options(options: OrtOptions) -> dict[str, Any]:
    providers: list[dict[str, Any]] = [{"cuda": {}}] if options.graph == "cuda" else []
    level = {FUSED_LEVEL: str(options.accuracy_level)} if options.graph == "portable" else {}
    return {"log_id": "h1export", "provider_options": providers, **SETTINGS[MODEL], **level}


def _search(model_config: FalconH1Config) -> dict[str, Any]:
    return {
        "do_sample": False,
        "max_length": model_config.max_position_embeddings,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": False,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
        "early_stopping": True,
        "length_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "diversity_penalty": 0.0,
    }
