"""genai_config.json, so that onnxruntime-genai runs the folder as it is.

Source: onnxruntime-genai's config reference; model type "decoder" takes states by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from h1export.core.spec import HybridSpec
from h1export.core.state import ATTENTION_MASK, INPUT_IDS, LOGITS, StateKind, StateTensor

CONFIG = "genai_config.json"


def write_config(spec: HybridSpec, model: str, folder: Path) -> None:
    """Write the config beside ``model``; token ids come from generation_config.json where the checkpoint has one."""
    config = {"model": _model(spec, model, _generation(folder)), "search": _search(spec)}
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _generation(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _model(spec: HybridSpec, model: str, generation: dict[str, Any]) -> dict[str, Any]:
    def pattern(side: str, kind: StateKind) -> str:
        name = StateTensor(0, kind, ())
        return (name.past if side == "past" else name.present).replace(".0.", ".%d.")

    eos = generation.get("eos_token_id", list(spec.eos_token_ids))
    tokens = {"bos_token_id": generation.get("bos_token_id", spec.bos_token_id), "eos_token_id": eos or None}
    tokens["pad_token_id"] = generation.get("pad_token_id", spec.pad_token_id)
    if tokens["pad_token_id"] is None:  # the client wants one; it is never read without padding
        tokens["pad_token_id"] = eos[0] if isinstance(eos, list) and eos else eos or 0
    return {
        "type": "decoder",
        **{key: value for key, value in tokens.items() if value is not None},
        "context_length": spec.max_position_embeddings,
        "vocab_size": spec.vocab_size,
        "decoder": {
            "session_options": {"log_id": "h1export", "provider_options": []},
            "filename": model,
            "head_size": spec.head_dim,
            "hidden_size": spec.hidden_size,
            "num_attention_heads": spec.num_attention_heads,
            "num_key_value_heads": spec.num_key_value_heads,
            "num_hidden_layers": spec.num_hidden_layers,
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


def _search(spec: HybridSpec) -> dict[str, Any]:
    return {
        "do_sample": False,
        "max_length": spec.max_position_embeddings,
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
