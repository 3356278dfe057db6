"""The borders of a conversation's turns: they are beginnings of what follows, and stay when it goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_templates import TEMPLATES

from h1export.checkpoint.chat_template import ChatTemplate
from h1export.checkpoint.conversation import MOST_BORDERS, Conversations
from h1export.checkpoint.tokenizer import load_tokenizer
from h1export.model.falcon_h1.config import FalconH1Config

OPENED = TEMPLATES["chatml"].replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>{% endif")
Made = Callable[[str], Conversations]


@pytest.fixture(scope="module")
def made(tiny: Path) -> Made:
    template = ChatTemplate.read(tiny)
    tokenizer, config = load_tokenizer(tiny), FalconH1Config.load(tiny)
    return lambda text: Conversations(ChatTemplate(tiny, {"default": text}, {}, template.process), tokenizer, config)


def talk(turns: int) -> list[dict[str, Any]]:
    replies = [{"role": "assistant", "content": "xyz"}, {"role": "assistant", "content": "A reply."}]
    found = [
        part for turn in range(turns) for part in ({"role": "user", "content": f"Turn {turn}?"}, replies[turn % 2])
    ]
    return [{"role": "system", "content": "Be brief."}, *found][: 2 * turns]


@pytest.mark.parametrize("template", [TEMPLATES["chatml"], TEMPLATES["headers"], OPENED])
def test_a_turn_keeps_its_border(made: Made, template: str) -> None:
    """Also where a reply begins like the one that finds the border, and where a template opens replies otherwise."""
    conversations = made(template)
    before: list[int] = []
    for turns in range(1, 4):
        messages = talk(turns)
        prompt = conversations.ids(messages)
        borders = conversations.borders(messages, prompt)
        assert borders[:-1] == before
        assert borders[-1] == conversations.last_border(messages, prompt)
        closed = conversations.ids([*messages, {"role": "assistant", "content": "other"}], reply=False)
        assert closed[: borders[-1]] == prompt[: borders[-1]]
        assert borders[-1] >= len(prompt) - 6
        before = borders


def test_long_conversations_have_fewer(made: Made) -> None:
    conversations = made(TEMPLATES["chatml"])
    found = []
    for turns in (MOST_BORDERS, MOST_BORDERS + 1, 2 * MOST_BORDERS):
        messages = talk(turns)
        found.append(conversations.borders(messages, conversations.ids(messages)))
    whole, half, last = found
    assert len(whole) == len(last) == MOST_BORDERS
    assert half == [*whole[::2], half[-1]]
    assert last[: len(half)] == half


def test_a_template_that_takes_no_reply_has_none(made: Made) -> None:
    refusing = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}x{% endfor %}"
    )
    messages = talk(1)
    conversations = made(refusing)
    assert conversations.borders(messages, conversations.ids(messages)) == []
