"""The tokens of a conversation, and the borders of its messages: where the states stay right when it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from h1export.checkpoint.chat_template import ChatTemplate, Message
from h1export.checkpoint.tokenizer import Tokenizer
from h1export.checkpoint.vocabulary import prompt_ids
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config

USER, ASSISTANT = "user", "assistant"
MOST_BORDERS = 16  # each costs two renderings
SOME_REPLY = "x"


@dataclass(frozen=True)
class Conversations:
    """Renders conversations for one model. Threads may share it.

    Attributes:
        template: The chat templates.
        tokenizer: The tokenizer.
        config: The model.
    """

    template: ChatTemplate
    tokenizer: Tokenizer
    config: FalconH1Config

    def ids(
        self,
        messages: Sequence[Message],
        *,
        reply: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the tokens of a conversation; ``reply`` says whether the beginning of a reply follows.

        Raises:
            H1ExportError: The template does not take the conversation, or it is far longer than the context.
        """
        text = self.template.render(messages, reply=reply, tools=tools, variables=variables)
        # a chat template writes the special tokens itself
        found = prompt_ids(self.tokenizer, text, self.config, add_special_tokens=False)
        return [int(token) for token in found]

    def borders(self, messages: Sequence[Message], prompt: Sequence[int], **how: Any) -> list[int]:
        """Return up to where ``prompt``, the tokens of ``messages``, stays as it is when replies follow users' turns.

        Some templates open replies otherwise than they write them later. A turn's border does not depend on what
        follows it. Of more than MOST_BORDERS turns every second, fourth, ... has one.

        Args:
            messages: The conversation.
            prompt: Its tokens with the beginning of a reply.
            how: The keywords of ``ids``.
        """
        turns = [place for place, message in enumerate(messages, 1) if message["role"] == USER]
        step = 1
        while len(turns) > step * MOST_BORDERS:
            step *= 2
        found = {self._border(messages[:turn], prompt, turn == len(messages), how=how) for turn in turns[::step]}
        return sorted(found - {0})

    def last_border(self, messages: Sequence[Message], prompt: Sequence[int]) -> int:
        """Return up to where ``prompt`` stays as it is when a reply follows; 0 where nothing can follow."""
        return self._border(messages, prompt, True, how={})

    def _border(
        self, messages: Sequence[Message], prompt: Sequence[int], whole: bool, *, how: Mapping[str, Any]
    ) -> int:
        try:
            opened = prompt if whole else self.ids(messages, **how)
            closed = self.ids([*messages, {"role": ASSISTANT, "content": SOME_REPLY}], **{**how, "reply": False})
        except H1ExportError:
            return 0
        return min(common(opened, closed), common(opened, prompt))


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens the two begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
