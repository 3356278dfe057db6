"""What a task of lm-eval asks of generation, judged by value, for lm_eval.py.

A task may set any option of transformers' ``generate`` or of vLLM's sampling whose value leaves the text as it is. A
value that would give another text is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from h1export.errors import H1ExportError
from h1export.model.config_reader import shown
from h1export.model.falcon_h1.special_tokens import GENERATION_CONFIG
from h1export.runtime.generation import Sampling

WHERE = "generate_until"
MAX_NEW_TOKENS = 256  # for a task that sets no limit, as in lm-eval's own models
TOP_K = 50  # of sampling where neither the task nor the model says, as in transformers' `generate`
# names of the same limit; the first that is given counts, as in lm-eval's normalize_gen_kwargs
NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
READ = frozenset({*NEW_TOKENS, "max_length", "until", "do_sample", "temperature", "top_k", "top_p", "seed"})

# Options that change no text whatever their value is: how it is computed, what else is returned, and how to treat beams
# (of which there is one) or pads (of which there are none).
IDLE = frozenset(
    {
        "use_cache",
        "length_penalty",
        "early_stopping",
        "low_memory",
        "renormalize_logits",
        "output_scores",
        "output_logits",
        "output_attentions",
        "output_hidden_states",
        "return_dict_in_generate",
        "pad_token_id",
        "bos_token_id",
        "synced_gpus",
        "disable_compile",
        "prefill_chunk_size",
        "logprobs",
        "prompt_logprobs",
    }
)
# Options that transformers reads only when it samples, and the value that leaves the distribution as it is.
SAMPLED = {"typical_p": 1.0, "min_p": 0.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None}
# The numbers that leave the text as it is; no number does where None stands.
NEUTRAL: Mapping[str, float | None] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "n": 1,
    "best_of": 1,
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "guidance_scale": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_tokens": 0,
    "penalty_alpha": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "diversity_penalty": 0,
    "ignore_eos": 0,
    "include_stop_str_in_output": 0,
    "remove_invalid_values": 0,
    "skip_special_tokens": 1,
    "spaces_between_special_tokens": 1,
    "detokenize": 1,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "max_time": None,
    "exponential_decay_length_penalty": None,
    "bad_words_ids": None,
    "force_words_ids": None,
    "bad_words": None,
    "constraints": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "logit_bias": None,
    "logits_processor": None,
    "logits_processors": None,
    "stopping_criteria": None,
    "stop": None,
    "stop_strings": None,
    "stop_sequences": None,
    "stop_token_ids": None,
    "watermarking_config": None,
    "prompt_lookup_num_tokens": None,
    "assistant_model": None,
    "dola_layers": None,
    "cache_implementation": None,
}


@dataclass(frozen=True)
class Options:
    """How to continue a prompt.

    Attributes:
        new: The largest number of new tokens; a prompt that leaves less room is truncated at its beginning.
        total: The largest number of tokens of prompt and continuation together; None means that only ``new`` counts.
        until: Texts before which the continuation ends, none of them empty.
        sampling: How tokens are chosen.
    """

    new: int
    total: int | None
    until: tuple[str, ...]
    sampling: Sampling


def read_options(asked: Mapping[str, Any], model: Mapping[str, Any], seed: int) -> Options:
    """Return the meaning of a request's ``generation_kwargs``.

    Tokens are sampled where ``do_sample`` is true, or is not given beside a temperature above 0, as in lm-eval.

    Args:
        asked: The request's options. None is the same as no value.
        model: The options of the model's generation_config.json, which hold where the request says nothing; those of
            length and ``do_sample`` do not, because lm-eval always sets them.
        seed: A number of the request, which is added to the seed that the task gives.

    Raises:
        H1ExportError: An option is not known, has no meaning, or would give another text than greedy decoding or
            sampling by temperature, top-k and top-p.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    sampled = _samples(given)
    for name, value in given.items():
        same_end = name == "eos_token_id" and _ids(value) == _ids(model.get(name))
        if not (name in READ or same_end or _neutral(name, value, sampled)):
            known = name in NEUTRAL or name in SAMPLED or name == "eos_token_id"
            what = "would give another text" if known else "is no known option"
            raise H1ExportError(WHERE, f"{_shown(name, value)} {what}", "leave it out of the generation_kwargs")
    inherited = {name: value for name, value in model.items() if value is not None and name not in given}
    for name, value in inherited.items():
        if (name in NEUTRAL or name in SAMPLED) and not _neutral(name, value, sampled):
            raise H1ExportError(
                GENERATION_CONFIG,
                f"{_shown(name, value)} would give another text",
                "give the neutral value in the generation_kwargs",
            )
    found = _sampling({**inherited, **given}, seed) if sampled else Sampling()
    return Options(_new_tokens(given), _total(given), _until(given.get("until")), sampling=found)


def _neutral(name: str, value: Any, sampled: bool) -> bool:
    """Return whether the option with this ``value``, which is not None, leaves the text as it is."""
    if name in IDLE or (name in SAMPLED and not sampled):
        return True
    if name == "cache_implementation":
        return value in ("dynamic", "static")
    if name not in NEUTRAL and name not in SAMPLED:
        return False
    if isinstance(value, (str, list, tuple, dict, set, frozenset)) and not value:
        return True
    wanted = {**NEUTRAL, **SAMPLED}[name]
    if wanted is None:
        return value is False
    return _float(value) == wanted


def _samples(given: Mapping[str, Any]) -> bool:
    value = given.get("do_sample")
    temperature = _number(given, "temperature", default=0.0)
    if temperature < 0:
        raise H1ExportError(WHERE, f"{_shown('temperature', given['temperature'])} is below 0", "give 0 or more")
    if value is None:
        return temperature > 0
    chosen = {"true": True, "false": False, "1": True, "0": False}.get(str(value).strip().lower())
    if chosen is None and value in (0, 1):
        chosen = bool(value)
    if chosen is None:
        raise H1ExportError(WHERE, f"{_shown('do_sample', value)} is neither true nor false", "give one of them")
    return chosen


def _sampling(options: Mapping[str, Any], seed: int) -> Sampling:
    temperature = _number(options, "temperature", default=1.0)
    top_k = _whole(options, "top_k", TOP_K, least=-1)
    top_p = _number(options, "top_p", default=1.0)
    if not 0 <= top_p <= 1:
        raise H1ExportError(WHERE, f"{_shown('top_p', options['top_p'])} is not from 0 to 1", "give a probability")
    base = _whole(options, "seed", 0, least=None)
    if not top_p or not temperature:  # the likeliest token alone
        return Sampling()
    return Sampling(temperature, max(top_k, 0), top_p, seed=(base + seed) % (1 << 63))


def _new_tokens(given: Mapping[str, Any]) -> int:
    name = next((name for name in NEW_TOKENS if name in given), NEW_TOKENS[0])
    total = _total(given)
    default = MAX_NEW_TOKENS if total is None else min(MAX_NEW_TOKENS, total)
    return _whole(given, name, default, least=0)


def _total(given: Mapping[str, Any]) -> int | None:
    return _whole(given, "max_length", 0, least=1) if "max_length" in given else None


def _until(value: Any) -> tuple[str, ...]:
    terms = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(terms, (list, tuple)) or not all(isinstance(term, str) for term in terms):
        raise H1ExportError(WHERE, f"{_shown('until', value)} is no text or list of texts", "quote the stop strings")
    return tuple(term for term in terms if term)


def _ids(value: Any) -> set[int]:
    """Return the token ids of ``eos_token_id``, which is one or a list of them; empty for anything else."""
    ids = value if isinstance(value, (list, tuple)) else [value]
    return set(ids) if all(isinstance(one, int) for one in ids) else set()


def _float(value: Any) -> float:
    """Return a number, or text of one; NaN for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _number(options: Mapping[str, Any], name: str, *, default: float) -> float:
    value = options.get(name, default)
    number = _float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise H1ExportError(WHERE, f"{_shown(name, value)} is no number", "give a finite number")
    return number


def _whole(options: Mapping[str, Any], name: str, default: int, *, least: int | None) -> int:
    value = options.get(name, default)
    number = _number(options, name, default=default)
    if number != int(number) or (least is not None and number < least):
        expected = "a whole number" if least is None else f"a whole number from {least} on"
        raise H1ExportError(WHERE, f"{_shown(name, value)} is out of range", f"give {expected}")
    return value if isinstance(value, int) else int(number)


def _shown(name: str, value: Any) -> str:
    return f"{name}: {shown(value)}"
