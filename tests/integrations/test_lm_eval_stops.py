"""Stop strings of lm-eval's tasks are text, however it is split into tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval_requests import texts
from transformers.convert_slow_tokenizer import bytes_to_unicode

from h1export.integrations.lm_eval import ArtifactLM


@pytest.fixture
def spoken(ours: ArtifactLM, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int], list[str]], tuple[str, int]]:
    """spoken(tokens, stops) -> the text of a model that says ``tokens``, and how many of them it said."""

    def say(tokens: list[int], until: list[str]) -> tuple[str, int]:
        said: list[int] = []

        def generated(*_: Any, **__: Any) -> Any:
            for token in tokens:
                said.append(token)
                yield token

        monkeypatch.setattr("h1export.integrations.lm_eval.generate", generated)
        return texts(ours, ("x", {"until": until, "max_gen_toks": 190}))[0], len(said)

    return say


def byte_tokens(model: ArtifactLM, text: str) -> list[int]:
    """A token for each byte of ``text``."""
    letters: dict[int, str] = bytes_to_unicode()
    ids = [model._tokenizer.library.token_to_id(letters[byte]) for byte in text.encode()]
    assert None not in ids
    return [one for one in ids if one is not None]


def test_a_stop_string_is_text_and_no_byte(ours: ArtifactLM, spoken: Any) -> None:
    """`»` is C2 BB, `û` C3 BB and `뻻` EB BB BB: the token of the byte BB is called `»` in the tokenizer."""
    for text in ("û»x", "뻻»x"):
        tokens = byte_tokens(ours, text)
        assert spoken(tokens, ["»"]) == (text[0], len(tokens) - 1)
        assert spoken(ours.tok_encode(text), ["»"])[0] == text[0]
    assert spoken(byte_tokens(ours, "ûx"), ["»"]) == ("ûx", 4 - 1)


WORDS = st.text(st.sampled_from("ab»ûé뻻👍\n "), max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(text=WORDS, parts=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), max_size=3), other=WORDS)
def test_the_text_ends_before_its_first_stop_string(
    text: str, parts: list[tuple[int, int]], other: str, ours: ArtifactLM, spoken: Any
) -> None:
    """However the text is split into tokens; an empty stop string is none, and no token is computed in vain."""
    stops = [text[start : start + length] for start, length in parts] + [other]
    tokens = byte_tokens(ours, text)
    ends = [text.find(stop) + len(stop) for stop in stops if stop and stop in text]
    wanted = text[: min(ends)] if ends else text
    for stop in stops:  # one after the other, as lm-eval cuts where stop strings overlap
        wanted = wanted.split(stop)[0] if stop else wanted
    found, said = spoken(tokens, stops)
    assert found == wanted
    assert said == (len(text[: min(ends)].encode()) if ends else len(tokens))
