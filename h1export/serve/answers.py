"""Answers: what the events of a request become, whole or as the chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

from h1export.serve.choice import Ended, Event, Failed, Piece, Scored, Started
from h1export.serve.problems import failure
from h1export.serve.tools import Call, ToolText

TokenText = Callable[[int], str]
Json = dict[str, Any]


@dataclass
class _Text:
    """One choice so far."""

    text: str = ""
    scored: list[Scored] = field(default_factory=list)
    calls: list[Json] = field(default_factory=list)
    tools: ToolText | None = None
    reason: str | None = None


class Answer:
    """The answer to one request. Subclasses give the form of one kind.

    Args:
        model: The model's name.
        fingerprint: What tells this artifact from others.
        choices: The number of choices.
        token_text: Returns the text of a token alone.
        scored: Whether tokens have scores.
    """

    prefix = ""
    object = ""
    chunk_object = ""

    def __init__(self, model: str, fingerprint: str, choices: int, *, token_text: TokenText, scored: bool) -> None:
        self._head = {
            "id": f"{self.prefix}-{token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._choices = [_Text() for _ in range(choices)]
        self._token_text = token_text
        self._scored = scored
        self._prompt_tokens = 0
        self._reused = 0
        self._new_tokens = 0

    @property
    def is_done(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.reason is not None for choice in self._choices)

    def take(self, event: Event) -> list[Json]:
        """Take an event in, and return the ``choices`` of the chunks that it makes, each a chunk of its own.

        Raises:
            ProblemError: It is an error.
        """
        if isinstance(event, Failed):
            raise failure(event.error) from None
        if isinstance(event, Started):
            self._prompt_tokens += event.tokens
            self._reused += event.reused
            return self._started(event)
        choice = self._choices[event.index]
        if isinstance(event, Piece):
            self._new_tokens += 1
            new = [event.scored] if event.scored is not None else []
            choice.scored += new
            return self._more(event.index, event.text, new)
        found = self._more(event.index, event.text, [], last=True)
        choice.reason = event.reason
        return [*found, self._ended(event, choice)]

    def chunk(self, choices: Sequence[Json], usage: bool, counts: bool = False) -> Json:
        """Return a chunk. With ``usage`` chunks have the key, which has the counts in the last one, with ``counts``."""
        value = {"object": self.chunk_object, **self._head, "choices": list(choices)}
        return {**value, "usage": self.usage() if counts else None} if usage else value

    def whole(self) -> Json:
        """Return the answer that is no stream."""
        choices = [self._whole(index, choice) for index, choice in enumerate(self._choices)]
        return {"object": self.object, **self._head, "choices": choices, "usage": self.usage()}

    def usage(self) -> Json:
        """Return the numbers of tokens."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._new_tokens,
            "total_tokens": self._prompt_tokens + self._new_tokens,
            "prompt_tokens_details": {"cached_tokens": self._reused},
        }

    def _started(self, event: Started) -> list[Json]:
        raise NotImplementedError

    def _more(self, index: int, text: str, scored: list[Scored], *, last: bool = False) -> list[Json]:
        raise NotImplementedError

    def _ended(self, event: Ended, choice: _Text) -> Json:
        raise NotImplementedError

    def _whole(self, index: int, choice: _Text) -> Json:
        raise NotImplementedError


class ChatAnswer(Answer):
    """The answer of /v1/chat/completions; with ``tools`` calls of tools are taken out of the text."""

    prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, *arguments: Any, tools: bool, **others: Any) -> None:
        super().__init__(*arguments, **others)
        for choice in self._choices:
            choice.tools = ToolText() if tools else None

    def _started(self, event: Started) -> list[Json]:
        opening = {"role": "assistant", "content": ""}
        return [self._delta(index, opening, []) for index in range(len(self._choices))]

    def _more(self, index: int, text: str, scored: list[Scored], *, last: bool = False) -> list[Json]:
        choice = self._choices[index]
        parts: list[str | Call] = [text] if text else []
        if choice.tools is not None:
            parts = [*choice.tools.feed(text), *(choice.tools.rest() if last else [])]
        deltas: list[Json] = []
        for part in parts:
            if isinstance(part, Call):
                function = {"name": part.name, "arguments": part.arguments}
                call = {"id": f"call_{token_hex(12)}", "type": "function", "function": function}
                choice.calls.append(call)
                deltas.append({"tool_calls": [{"index": len(choice.calls) - 1, **call}]})
            elif part.strip() or choice.tools is None or not choice.calls:  # not the line end between two calls
                choice.text += part
                deltas.append({"content": part})
        if not deltas and scored and self._scored:
            deltas.append({})
        return [self._delta(index, delta, scored if place == 0 else []) for place, delta in enumerate(deltas)]

    def _ended(self, event: Ended, choice: _Text) -> Json:
        return {**self._delta(event.index, {}, []), "finish_reason": self._reason(choice)}

    def _whole(self, index: int, choice: _Text) -> Json:
        message: Json = {"role": "assistant", "content": choice.text or (None if choice.calls else ""), "refusal": None}
        if choice.calls:
            message["tool_calls"] = choice.calls
        logprobs = self._logprobs(choice.scored) if self._scored else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self._reason(choice)}

    def _reason(self, choice: _Text) -> str | None:
        return "tool_calls" if choice.calls and choice.reason == "stop" else choice.reason

    def _delta(self, index: int, delta: Json, scored: list[Scored]) -> Json:
        logprobs = self._logprobs(scored) if scored else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, scored: list[Scored]) -> Json:
        content = [
            {**self._one(one.token, one.logprob), "top_logprobs": [self._one(*pair) for pair in one.top]}
            for one in scored
        ]
        return {"content": content, "refusal": None}

    def _one(self, token: int, logprob: float | None) -> Json:
        text = self._token_text(token)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


class CompletionAnswer(Answer):
    """The answer of /v1/completions; ``echoed`` has the text of each prompt that the answer begins with."""

    prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, *arguments: Any, echoed: Sequence[str], per_prompt: int, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self._echoed = echoed
        self._per_prompt = per_prompt

    def _started(self, event: Started) -> list[Json]:
        if not self._echoed:
            return []
        found = []
        for index in range(event.index, event.index + self._per_prompt):
            choice = self._choices[index]
            choice.scored += event.scored
            found += self._more(index, self._echoed[event.index // self._per_prompt], list(event.scored))
        return found

    def _more(self, index: int, text: str, scored: list[Scored], *, last: bool = False) -> list[Json]:
        choice = self._choices[index]
        before = len(choice.text)
        choice.text += text
        if not text and not (scored and self._scored):
            return []
        return [self._choice(index, text, scored, offset=before, reason=None)]

    def _ended(self, event: Ended, choice: _Text) -> Json:
        return self._choice(event.index, "", [], offset=len(choice.text), reason=choice.reason)

    def _whole(self, index: int, choice: _Text) -> Json:
        return self._choice(index, choice.text, choice.scored, offset=0, reason=choice.reason)

    def _choice(self, index: int, text: str, scored: list[Scored], *, offset: int, reason: str | None) -> Json:
        logprobs = self._logprobs(scored, offset) if self._scored else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, scored: list[Scored], offset: int) -> Json:
        texts = [self._token_text(one.token) for one in scored]
        offsets = [offset + sum(map(len, texts[:place])) for place in range(len(texts))]
        tops: list[Json | None] = []
        for one in scored:
            top: Json = {}
            for token, logprob in one.top:
                top.setdefault(self._token_text(token), logprob)  # several may look alike; the likeliest is first
            tops.append(None if one.logprob is None else top)
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in scored],
            "top_logprobs": tops,
            "text_offset": offsets,
        }
