"""The options of a task's generation, judged by value."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval import tasks as lm_eval_tasks
from transformers import GenerationConfig

from h1export.errors import H1ExportError
from h1export.integrations.lm_eval_options import (
    IDLE,
    MAX_NEW_TOKENS,
    NEUTRAL,
    READ,
    SAMPLED,
    TOP_K,
    Options,
    read_options,
)
from h1export.model.falcon_h1.special_tokens import generation_config
from h1export.runtime.generation import Sampling

GREEDY = Sampling()
SAMPLES = {"do_sample": True, "temperature": 0.5}


def read(**asked: Any) -> Options:
    return read_options(asked, {}, 0)


NOTHING_ELSE: list[dict[str, Any]] = [
    {},
    {"num_beams": 1},
    {"num_beams": 1.0},
    {"num_beams": "1"},
    {"num_beams": None},
    {"repetition_penalty": 1.0},
    {"repetition_penalty": 1},
    {"seed": 1234},
    {"seed": None},
    {"do_sample": False},
    {"do_sample": False, "temperature": 0.7, "top_p": 0.95, "top_k": 40},
    {"do_sample": False, "temperature": 1, "min_p": 0.1, "typical_p": 0.9, "top_h": 0.4},
    {"do_sample": "false", "temperature": 1.0},
    {"do_sample": 0},
    {"do_sample": None, "temperature": 0},
    {"temperature": 0.0},
    {"temperature": "0.0"},
    {"temperature": None},
    {"do_sample": True, "temperature": 0.0},
    {"no_repeat_ngram_size": 0},
    {"min_new_tokens": 0, "min_length": 0},
    {"num_return_sequences": 1, "n": 1, "best_of": 1},
    {"length_penalty": 0.6, "early_stopping": True, "use_cache": False},
    {"bad_words_ids": None, "suppress_tokens": [], "logit_bias": {}, "stop": [], "stop_strings": ""},
    {"presence_penalty": 0.0, "frequency_penalty": 0, "ignore_eos": False, "skip_special_tokens": True},
    {"cache_implementation": "static"},
    {"some_option_of_tomorrow": None},
]


@pytest.mark.parametrize("asked", NOTHING_ELSE, ids=repr)
def test_values_that_change_no_text_are_accepted(asked: dict[str, Any]) -> None:
    assert read(**asked) == Options(MAX_NEW_TOKENS, None, (), sampling=GREEDY)


OTHER_TEXTS: list[tuple[str, Any]] = [
    ("num_beams", 2),
    ("num_beams", "4"),
    ("num_beams", "many"),
    ("repetition_penalty", 1.1),
    ("repetition_penalty", math.nan),
    ("no_repeat_ngram_size", 3),
    ("num_return_sequences", 2),
    ("min_new_tokens", 1),
    ("penalty_alpha", 0.6),
    ("presence_penalty", -0.5),
    ("bad_words_ids", [[3]]),
    ("suppress_tokens", [1]),
    ("forced_eos_token_id", 0),
    ("logit_bias", {"5": 1}),
    ("stop", ["\n"]),
    ("stop_strings", "end"),
    ("skip_special_tokens", False),
    ("ignore_eos", True),
    ("eos_token_id", 5),
    ("cache_implementation", "quantized"),
    ("guidance_scale", 1.5),
    ("max_time", 3.0),
    ("temprature", 0.7),
    ("temprature", 0),
    ("do_sample", "perhaps"),
    ("do_sample", 2),
    ("do_sample", [True]),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", "hot"),
    ("temperature", [0.5]),
    ("temperature", True),
    ("until", 5),
    ("until", [5]),
    ("until", ["\n", None]),
    ("until", {"\n": 1}),
    ("max_gen_toks", -1),
    ("max_gen_toks", 2.5),
    ("max_gen_toks", "many"),
    ("max_gen_toks", True),
    ("max_gen_toks", math.inf),
    ("max_length", 0),
]


@pytest.mark.parametrize(("name", "value"), OTHER_TEXTS, ids=repr)
def test_values_that_would_change_the_text_are_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(H1ExportError) as caught:
        read(**{name: value})
    assert f"{name}: {value!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("typical_p", 0.9), ("min_p", 0.1), ("top_h", 0.4), ("top_p", 1.5), ("top_k", -2), ("top_k", 1.5)],
)
def test_what_only_sampling_reads_is_refused_there(name: str, value: Any) -> None:
    assert read(**{name: value}).sampling == GREEDY
    with pytest.raises(H1ExportError, match=f"{name}: {value!r}"):
        read(**SAMPLES, **{name: value})


@pytest.mark.parametrize(
    ("asked", "sampling"),
    [
        (SAMPLES, Sampling(0.5, TOP_K)),
        ({"temperature": "0.5"}, Sampling(0.5, TOP_K)),
        ({"temperature": 0.5, "do_sample": None, "top_k": 40.0, "top_p": "0.9"}, Sampling(0.5, 40, 0.9)),
        ({"do_sample": 1}, Sampling(1.0, TOP_K)),
        ({"do_sample": "True", "top_k": 0}, Sampling(1.0, 0)),
        ({**SAMPLES, "top_k": -1, "top_p": None}, Sampling(0.5, 0)),
        ({**SAMPLES, "seed": 7}, Sampling(0.5, TOP_K, seed=7)),
        ({**SAMPLES, "typical_p": 1.0, "min_p": 0, "epsilon_cutoff": 0.0}, Sampling(0.5, TOP_K)),
        ({**SAMPLES, "top_p": 0}, GREEDY),
    ],
    ids=repr,
)
def test_sampling(asked: dict[str, Any], sampling: Sampling) -> None:
    assert read(**asked).sampling == sampling


def test_requests_have_seeds_of_their_own() -> None:
    seeds = {read_options({**SAMPLES, "seed": 7}, {}, number).sampling.seed for number in range(5)}
    assert len(seeds) == 5


@pytest.mark.parametrize(
    ("asked", "new", "total"),
    [
        ({"max_gen_toks": 8}, 8, None),
        ({"max_new_tokens": "8"}, 8, None),
        ({"max_tokens": 8.0}, 8, None),
        ({"max_completion_tokens": 8}, 8, None),
        ({"max_tokens": 9, "max_gen_toks": 8}, 8, None),
        ({"max_gen_toks": None, "max_tokens": 9}, 9, None),
        ({"max_gen_toks": 0}, 0, None),
        ({"max_length": 40}, 40, 40),
        ({"max_length": 4000}, MAX_NEW_TOKENS, 4000),
        ({"max_length": 4000, "max_gen_toks": 8}, 8, 4000),
    ],
    ids=repr,
)
def test_lengths(asked: dict[str, Any], new: int, total: int | None) -> None:
    found = read(**asked)
    assert (found.new, found.total) == (new, total)


@pytest.mark.parametrize(
    ("until", "terms"),
    [(None, ()), ("\n", ("\n",)), ("", ()), ([], ()), (["", "»", ""], ("»",)), (("a", "b"), ("a", "b"))],
    ids=repr,
)
def test_stop_strings(until: Any, terms: tuple[str, ...]) -> None:
    assert read(until=until).until == terms


def test_defaults_of_transformers_change_no_text() -> None:
    """Every option that transformers' `generate` has is known, and its default is accepted in both modes."""
    config: Any = GenerationConfig()
    defaults = {**dict.fromkeys(vars(config)), **config._get_default_generation_params()}
    limits = {"max_length", "do_sample", "temperature"}
    judged = {name: value for name, value in defaults.items() if name not in limits and not name.startswith("_")}
    harmless = {"num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"}
    harmless |= {"assistant_lookbehind", "target_lookbehind", "transformers_version"}  # no task gives them
    for name in judged.keys() - harmless:
        assert read(**{name: judged[name]}).sampling == GREEDY
        assert read(**SAMPLES, **{name: judged[name]}).sampling.temperature == 0.5


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(NEUTRAL)),
    value=st.one_of(
        st.integers(), st.floats(), st.text(max_size=3), st.booleans(), st.lists(st.integers(), max_size=2)
    ),
)
def test_a_value_is_neutral_or_refused(name: str, value: Any) -> None:
    """Whatever its type is, only the neutral number and what is empty are accepted, and nothing else is raised."""
    try:
        neutral = float(value) == NEUTRAL[name]
    except (TypeError, ValueError, OverflowError):
        neutral = False
    choice = name == "cache_implementation"  # transformers takes a known name only
    empty = not choice and (value == "" or value == [] or (value is False and NEUTRAL[name] is None))
    try:
        assert read(**{name: value}) == read()
        accepted = True
    except H1ExportError:
        accepted = False
    cached = choice and value in ("dynamic", "static")
    assert accepted == (neutral or empty or cached)


def test_the_models_own_options_hold_where_the_task_says_nothing(tmp_path: Path) -> None:
    model = {"top_k": 5, "top_p": 0.8, "temperature": 0.6, "do_sample": True, "max_new_tokens": 128, "max_length": 9}
    assert read_options({}, model, 0) == read()  # lm-eval sets these itself
    assert read_options({"do_sample": True}, model, 0).sampling == Sampling(0.6, 5, 0.8)
    assert read_options({**SAMPLES, "top_k": 7}, model, 0).sampling == Sampling(0.5, 7, 0.8)
    with pytest.raises(H1ExportError, match=r"generation_config.json: repetition_penalty: 1.2"):
        read_options({}, {"repetition_penalty": 1.2}, 0)
    assert read_options({"repetition_penalty": 1.0}, {"repetition_penalty": 1.2}, 0) == read()
    assert read_options({"eos_token_id": 3}, {"eos_token_id": [3]}, 0) == read()
    assert generation_config(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text('{"top_k": 3}')
    assert generation_config(tmp_path) == {"top_k": 3}


class Yaml(yaml.CSafeLoader):
    """YAML with lm-eval's tags, whose functions are not called."""


Yaml.add_multi_constructor("!", lambda loader, suffix, node: str(node.value))


def published_options() -> list[dict[str, Any]]:
    """The generation_kwargs of every fifth task that lm-eval ships, without repeats."""
    folder = Path(lm_eval_tasks.__file__).parent
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*yaml*"))[::5]:  # reading all takes long
        text = path.read_text(encoding="utf-8") if path.is_file() and "yaml" in path.name else ""
        if "generation_kwargs" not in text:
            continue
        task = yaml.load(text, Yaml)
        options = task.get("generation_kwargs") if isinstance(task, dict) else None
        if isinstance(options, dict):
            found[repr(options)] = options
    return list(found.values())


def test_published_tasks_options_are_read_or_are_beams() -> None:
    options = published_options()
    assert len(options) > 20
    for asked in options:
        if asked.get("num_beams", 1) != 1:
            with pytest.raises(H1ExportError, match="num_beams: 10"):
                read(**asked)
            continue
        sampled = asked.get("do_sample", bool(float(asked.get("temperature", 0))))
        assert (read(**asked).sampling.temperature > 0) is sampled


def test_the_tables_do_not_overlap() -> None:
    tables = [READ, IDLE, frozenset(SAMPLED), frozenset(NEUTRAL)]
    assert sum(map(len, tables)) == len(frozenset().union(*tables))
