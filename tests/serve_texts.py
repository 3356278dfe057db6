"""Texts, schemas and tools that the tests of the server ask for."""

from __future__ import annotations

from typing import Any

LONG = "\n".join(f"def function_{number}(argument): return argument * {number}" for number in range(18))
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "pair", "parameters": SCHEMA}}


def user(text: str) -> Any:
    return {"role": "user", "content": text}
