"""Calls of tools in a model's text, in the form of Hermes and Qwen templates: JSON between two tags."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

TAG, END_TAG = "<tool_call>", "</tool_call>"
OPEN, CLOSE = f"{TAG}\n", f"\n{END_TAG}"


@dataclass(frozen=True)
class Call:
    """A call: the name of the function, and its arguments as a JSON text."""

    name: str
    arguments: str


class ToolText:
    """Splits a text that comes in pieces into text and calls. What only looks like a call stays text."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> list[str | Call]:
        """Return what is certain with ``text``: pieces of text, and calls that are whole."""
        self._held += text
        found: list[str | Call] = []
        while True:
            begin = self._held.find(TAG)
            if begin < 0:
                keep = max((size for size in range(1, len(TAG)) if self._held.endswith(TAG[:size])), default=0)
                found.append(self._held[: len(self._held) - keep])
                self._held = self._held[len(self._held) - keep :]
                break
            end = self._held.find(END_TAG, begin)
            found.append(self._held[:begin])
            self._held = self._held[begin:]
            if end < 0:
                break
            end += len(END_TAG) - begin
            found.append(_call(self._held[:end]))
            self._held = self._held[end:]
        return [part for part in found if part]

    def rest(self) -> list[str | Call]:
        """Return what is left when the text has ended: a call that is whole but for its end tag is one."""
        held, self._held = self._held, ""
        if not held:
            return []
        return [_call(held + END_TAG, held)] if held.startswith(TAG) else [held]


def _call(text: str, otherwise: str | None = None) -> str | Call:
    """Return the call in ``text``, tags included, or ``otherwise``, which is the text itself if not given."""
    try:
        value: Any = json.loads(text[len(TAG) : -len(END_TAG)])
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        arguments = value.get("arguments", {})
        return Call(value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments))
    return text if otherwise is None else otherwise
