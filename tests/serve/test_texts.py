"""What ends a text and what is taken out of it, however the text comes in pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.runtime.generation import Sampler, Sampling
from h1export.serve.choice import Choice, Ended, Piece
from h1export.serve.tools import Call, ToolText


class Pieces:
    """A decoder that gives prepared pieces, and a rest."""

    def __init__(self, pieces: list[str], rest: str) -> None:
        self._pieces, self._rest = iter(pieces), rest

    def step(self, token: int) -> str:
        return next(self._pieces)

    def rest(self) -> str:
        return self._rest


def cut_in_pieces(data: st.DataObject, text: str) -> list[str]:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_text_ends_before_the_first_stop(data: st.DataObject) -> None:
    text = data.draw(st.text("ab", max_size=14))
    stops = data.draw(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
    *pieces, rest = cut_in_pieces(data, text)
    decoder: Any = Pieces(pieces, rest)
    events: list[Any] = []
    choice = Choice(0, Sampler(Sampling()), decoder, end=frozenset(), most=len(pieces), stops=stops, emit=events.append)
    while choice.take(np.zeros(3, np.float32)) is not None:
        pass
    places = [text.find(stop) for stop in stops if stop in text]
    said = "".join(event.text for event in events)
    first = min(places, default=len(text))
    # of two stops that overlap, the one that is whole first ends the text
    whole = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=len(text))
    assert text.startswith(said)
    assert first <= len(said) <= max(first, whole) if places else said == text
    assert not any(stop in said for stop in stops)
    assert [type(event) for event in events] == [Piece] * (len(events) - 1) + [Ended]
    assert events[-1].reason == ("stop" if places else "length")


PARTS = st.sampled_from(
    [
        "text ",
        "<tool",
        "\n",
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
        '<tool_call>{"name": "g", "arguments": "{}"}</tool_call>',
        "<tool_call>nonsense</tool_call>",
        '<tool_call>{"name": 3}</tool_call>',
        "</tool_call>",
        '<tool_call>{"name": "h"}',
        "<tool_call>[",
    ]
)


def split(pieces: list[str]) -> tuple[str, list[Call]]:
    tools = ToolText()
    found = [part for piece in pieces for part in tools.feed(piece)] + tools.rest()
    return "".join(part for part in found if isinstance(part, str)), [p for p in found if isinstance(p, Call)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_calls_are_found_in_any_pieces(data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(PARTS, max_size=5)))
    assert split(cut_in_pieces(data, text)) == split([text])
    assert split(list(text)) == split([text])


def test_calls_and_what_only_looks_like_them() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert split([f"so {call}\n{call}"]) == ("so \n", [Call("f", '{"a": 1}')] * 2)
    assert split(['<tool_call>{"name": "h"}']) == ("", [Call("h", "{}")])
    for text in ("<tool_call>nonsense</tool_call>", "<tool_call>[", "<tool", '<tool_call>{"name": 3}</tool_call>'):
        assert split([text]) == (text, [])
