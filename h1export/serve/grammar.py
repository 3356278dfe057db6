"""Grammars that restrict the tokens of a text, by llguidance: JSON schemas, and calls of tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer

from h1export.checkpoint.tokenizer import Tokenizer
from h1export.errors import native_error
from h1export.serve.problems import ProblemError
from h1export.serve.requests import FunctionForm
from h1export.serve.tools import CLOSE, OPEN

ANY_OBJECT: dict[str, Any] = {"type": "object"}
COMPACT = {"whitespace_flexible": False}  # a model that is not sure would write spaces for ever
MOST_SCHEMA = 1 << 18  # characters


class Matcher:
    """The place of one text in a grammar; it implements ``choice.Grammar``."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> npt.NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(np.bool_)
        return np.pad(mask, (0, self._vocab_size - len(mask)))

    def take(self, token: int) -> bool:
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ProblemError(
                400, f"the grammar cannot be followed: {self._matcher.get_error()}", param="response_format"
            )


class Grammars:
    """Makes matchers for one tokenizer. Threads may share it.

    Args:
        tokenizer: The model's tokenizer.
        vocab_size: The number of its logits.
        end: The tokens that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        text = tokenizer.library.to_str()
        with native_error(tokenizer.path, "llguidance cannot read the tokenizer", "leave out response_format"):
            self._tokenizer = LLTokenizer(text, n_vocab=vocab_size, eos_token=list(end) or None)

    def of_schema(self, schema: dict[str, Any]) -> Matcher:
        """Return a matcher of JSON texts that fit ``schema``. Raises ProblemError where it is no schema."""
        _text(schema)
        return self._matcher(LLMatcher.grammar_from_json_schema(schema, overrides=COMPACT))

    def of_calls(self, functions: Sequence[FunctionForm]) -> Matcher:
        """Return a matcher of a call of one of the functions. Raises ProblemError where a schema of theirs is none."""
        calls = {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {"name": {"const": function.name}, "arguments": function.parameters or ANY_OBJECT},
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
                for function in functions
            ],
            "x-guidance": COMPACT,
        }
        text = f"start: {json.dumps(OPEN)} %json {_text(calls)} {json.dumps(CLOSE)}"
        return self._matcher(LLMatcher.grammar_from_lark(text))

    def _matcher(self, grammar: str) -> Matcher:
        with native_error("response_format", "llguidance cannot read the schema", "simplify it"):
            matcher = LLMatcher(self._tokenizer, grammar)
        if matcher.is_error():
            raise ProblemError(400, f"the schema cannot be used: {matcher.get_error()}", param="response_format")
        return Matcher(matcher, self._vocab_size)


def _text(schema: dict[str, Any]) -> str:
    try:
        text = json.dumps(schema)
    except (ValueError, RecursionError):
        text = " " * (MOST_SCHEMA + 1)
    if len(text) > MOST_SCHEMA:
        raise ProblemError(400, f"a schema has {MOST_SCHEMA} characters at most", param="response_format")
    return text
