"""How tokens are chosen: penalties, minimal probabilities, biases and masks, against their definitions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.errors import H1ExportError
from h1export.runtime.generation import Sampler, Sampling

LOGITS = np.log(np.array([0.5, 0.25, 0.125, 0.1, 0.025], np.float32))


def chosen(sampling: dict[str, Any], times: int = 2000) -> set[int]:
    """The tokens that a new text may begin with."""
    rng = np.random.default_rng(0)
    return {Sampler(Sampling(**sampling), rng=rng).choose(LOGITS) for _ in range(times)}


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, {0}),
        ({"temperature": 1.0}, {0, 1, 2, 3, 4}),
        ({"temperature": 1.0, "top_k": 2}, {0, 1}),
        ({"temperature": 1.0, "top_p": 0.7}, {0, 1}),
        ({"temperature": 1.0, "min_p": 0.24}, {0, 1, 2}),
        ({"temperature": 1.0, "min_p": 1.0}, {0}),
        ({"temperature": 1.0, "min_p": 0.01, "top_k": 3}, {0, 1, 2}),
        ({"bias": ((3, 100.0),)}, {3}),
        ({"bias": ((0, -100.0),)}, {1}),
    ],
)
def test_what_may_be_chosen(sampling: dict[str, Any], expected: set[int]) -> None:
    assert chosen(sampling) == expected


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_penalties_are_their_definitions(data: st.DataObject) -> None:
    number = st.floats(-2, 2, width=32)
    how = Sampling(
        presence_penalty=data.draw(number),
        frequency_penalty=data.draw(number),
        repetition_penalty=data.draw(st.floats(0.5, 2, width=32)),
    )
    prompt = data.draw(st.lists(st.integers(0, 4), max_size=3))
    sampler = Sampler(how, prompt)
    text: list[int] = []
    for _ in range(6):
        logits = np.array(data.draw(st.lists(st.floats(-5, 5, width=32), min_size=5, max_size=5)), np.float32)
        kept = logits.copy()
        expected = []
        for token, logit in enumerate(logits.tolist()):
            if token in {*prompt, *text}:
                logit = logit / how.repetition_penalty if logit > 0 else logit * how.repetition_penalty
            count = Counter(text)[token]
            expected.append(logit - (count > 0) * how.presence_penalty - count * how.frequency_penalty)
        token = sampler.choose(logits)
        assert expected[token] >= max(expected) - 1e-5
        assert np.array_equal(logits, kept)
        text.append(token)


def test_a_mask_leaves_what_it_allows() -> None:
    allowed = np.array([False, False, True, True, False])
    sampler = Sampler(Sampling(temperature=2.0, bias=((0, 50.0),)))
    assert {sampler.choose(LOGITS, allowed) for _ in range(200)} == {2, 3}


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": float("nan")},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": float("inf")},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("nan")},
        {"bias": ((1, float("nan")),)},
    ],
    ids=str,
)
def test_what_is_no_sampling(wrong: dict[str, Any]) -> None:
    with pytest.raises(H1ExportError, match=r"sampling: "):
        Sampling(**wrong)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_choose_nothing(wrong: float, temperature: float) -> None:
    logits = LOGITS.copy()
    logits[2 if wrong != -np.inf else np.s_[:]] = wrong  # a single excluded token is none's fault
    with pytest.raises(H1ExportError, match=r"^logits: that of token \d, the largest, is "):
        Sampler(Sampling(temperature=temperature)).choose(logits)
