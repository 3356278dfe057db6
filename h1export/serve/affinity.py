"""Affinity: which requests should meet the same states, where several servers answer for one artifact.

Requests of one conversation begin alike, and a server that has computed the beginning has its states. So a conversation
has a key, which is that of its beginning, and goes to the server of its key.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

SESSION_HEADER = b"x-session-id"
MOST_KEY = 512  # characters of a key that a client gives
BEGINNING = 1024  # characters, or tokens, of a prompt


class _Beginning(msgspec.Struct):
    """What the key is made of; all else of a body is passed over."""

    model: Any = None
    prompt_cache_key: Any = None
    messages: Any = None
    prompt: Any = None


def affinity(headers: list[tuple[bytes, bytes]], body: bytes) -> str:
    """Return the key of a request: hexadecimal digits, or nothing where no server is better than another.

    It is that of the header x-session-id, or of the field ``prompt_cache_key``, or of the model with the messages up to
    the first one of a user, or with the beginning of a prompt. Nothing is checked here: a request may be wrong.

    Args:
        headers: The request's headers, with names in small letters.
        body: The request's body.
    """
    session = next((value for name, value in headers if name == SESSION_HEADER and value), b"")
    if session:
        return _digest(b"session", session[:MOST_KEY])
    try:
        found = msgspec.json.decode(body, type=_Beginning)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    if isinstance(found.prompt_cache_key, str) and found.prompt_cache_key:
        return _digest(b"key", found.prompt_cache_key[:MOST_KEY].encode("utf-8", "surrogatepass"))
    begins: Any = None
    if isinstance(found.messages, list):
        first = next((place for place, one in enumerate(found.messages) if _is_users(one)), len(found.messages))
        begins = found.messages[: first + 1]
    elif isinstance(found.prompt, str | list):
        begins = found.prompt[:BEGINNING]
    if not begins:
        return ""
    return _digest(b"text", msgspec.json.encode([found.model, begins]))


def _is_users(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "user"


def _digest(kind: bytes, data: bytes) -> str:
    return hashlib.sha256(kind + b":" + data).hexdigest()
