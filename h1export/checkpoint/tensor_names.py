"""Recognises the names of tensors that a Falcon-H1 model does not need, and names that a wrapper has changed."""

from __future__ import annotations

import re
from collections.abc import Collection

from h1export.errors import H1ExportError

# Buffers that older libraries save and every library computes anew, and heads beside the language model's own.
_BUFFERS = re.compile(r"(^|\.)(inv_freq|original_inv_freq|mup_vector|(cos|sin)_cached|masked_bias|position_ids)$")
_HEADS = re.compile(
    r"^(model\.)?(score|classifier|classification_head|regression_head|reward_head|rm_head|v_head|value_head"
    r"|qa_outputs|summary|mtp\w*|medusa\w*|eagle\w*)(\.|$)"
)
# Matrices that PEFT adds to a model's own.
_ADAPTER = re.compile(r"\.(lora_(embedding_)?[AB]|lora_magnitude_vector|vera_lambda_[bd]|ia3_l|hada_w\w+)(\.|$)")
# Components of names that wrappers add: DataParallel and DDP, torch.compile, PEFT, FSDP, activation checkpointing.
_WRAPPERS = frozenset(
    {
        "module",
        "_orig_mod",
        "base_model",
        "base_layer",
        "original_module",
        "modules_to_save",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
    }
)
_OUTSIDE = frozenset({"model", "language_model", "causal_lm", "pretrained_model", "transformer", "backbone"})
MODEL = "model"
_LM_HEAD = "lm_head"


def is_extra(name: str) -> bool:
    """Return whether a tensor is a buffer that is computed, or a head that a language model does not use."""
    inner = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return bool(_BUFFERS.search(inner) or _HEADS.search(inner))


def plain_name(name: str) -> str:
    """Return the name of a tensor without what wrappers add, below the ``model`` or ``lm_head`` that it should have.

    A name that no wrapper changed stays as it is.
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts and parts[0] in _OUTSIDE:
        parts = parts[1:]
    if parts and parts[0] == _LM_HEAD:
        return ".".join(parts)
    return ".".join([MODEL, *parts])


def missing(where: object, name: str, found: Collection[str]) -> H1ExportError:
    """Return the error for the tensor ``name`` that is not among ``found``; it says where a wrapper renamed it."""
    title = f'{where}: tensor "{name}"'
    other = next((other for other in sorted(found) if plain_name(other) == name), None)
    if other is not None:
        return H1ExportError(title, f'is missing, and is there as "{other}" ({_change(name, other)})', _cure(other))
    if any(_HEADS.search(plain_name(other).removeprefix(f"{MODEL}.")) for other in found) and name.startswith(_LM_HEAD):
        return H1ExportError(
            title, "is missing: the checkpoint has another head instead", "give a checkpoint of the language model"
        )
    return H1ExportError(title, "is missing", "download the checkpoint again")


def second_copy(where: object, name: str, used: Collection[str]) -> H1ExportError | None:
    """Return the error for the tensor ``name`` beside a model's tensors ``used``; None where the name says nothing."""
    title = f'{where}: tensor "{name}"'
    plain = plain_name(name)
    if _ADAPTER.search(name):
        what = "is a matrix of an adapter that is not merged"
        return H1ExportError(title, what, "call merge_and_unload() in PEFT and save the result")
    if plain != name and plain in used:
        what = f'is "{plain}" under another name ({_change(plain, name)}), and the checkpoint has both'
        return H1ExportError(title, what, "remove the one that is out of date")
    return None


def _change(name: str, other: str) -> str:
    if other.endswith(f".{name}"):
        return f'the prefix "{other.removesuffix(name)}" is in front'
    if name == f"{MODEL}.{other}":
        return f'the prefix "{MODEL}." is missing'
    inner = name.removeprefix(f"{MODEL}.")
    if other.endswith(inner):
        return f'its prefix is "{other.removesuffix(inner)}" instead of "{MODEL}."'
    added = [part for part in other.split(".") if part in _WRAPPERS]
    return f'a wrapper added "{", ".join(dict.fromkeys(added))}" inside the name'


def _cure(other: str) -> str:
    parts = other.split(".")
    if "base_model" in parts or "base_layer" in parts:
        return "call merge_and_unload() in PEFT and save the result, or rename the tensors"
    return "save the model itself and not its wrapper (save_pretrained of the causal language model), or rename them"
