"""Requests that are wrong in any way: a 4xx in the API's own form, no traceback, and no effect on others."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_texts import SCHEMA, TOOL, user

from h1export.serve import exchange
from h1export.serve.server import Server

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": [user("x")], "max_tokens": 1, "temperature": 0},
    TEXT: {"model": "tiny", "prompt": "x", "max_tokens": 1, "temperature": 0},
}
JSON = {"Content-Type": "application/json"}


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"properties": {"a": value}}
    return value


def check_refused(answer: httpx2.Response, statuses: tuple[int, ...] = (400,)) -> dict[str, Any]:
    assert answer.status_code in statuses, answer.text[:300]
    (error,) = answer.json().values()
    assert answer.json().keys() == {"error"}
    assert error.keys() == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) <= 300
    assert "\n" not in error["message"]
    assert not any(word in answer.text for word in ("Traceback", "File \\", ".py", "/tmp"))
    return dict(error)


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


# path, what is changed in a good body, and a part of the message
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "model_missing": (TEXT, {"model": None}, "got `null`"),
    "model_number": (TEXT, {"model": 3}, "got `int`"),
    "prompt_missing": (TEXT, {"prompt": None}, "got `null`"),
    "prompt_empty": (TEXT, {"prompt": ""}, "no tokens"),
    "prompt_empty_list": (TEXT, {"prompt": []}, "length >= 1"),
    "prompt_empty_tokens": (TEXT, {"prompt": [[]]}, "no tokens"),
    "prompt_mixed": (TEXT, {"prompt": ["x", 3]}, "texts only, tokens only"),
    "prompt_mixed_lists": (TEXT, {"prompt": [[1], "x"]}, "texts only, tokens only"),
    "prompt_floats": (TEXT, {"prompt": [1.5]}, "got `float`"),
    "prompt_deep": (TEXT, {"prompt": [[[1]]]}, "got `array`"),
    "prompt_beyond": (TEXT, {"prompt": [4096]}, "not from 0 to 4095"),
    "prompt_far_beyond": (TEXT, {"prompt": [1 << 62]}, "<= 2147483648"),
    "prompt_negative": (TEXT, {"prompt": [-1]}, ">= 0"),
    "prompt_long": (TEXT, {"prompt": [5] * 4096}, "has 4096 tokens, and the model's context is 4096"),
    "prompt_very_long": (TEXT, {"prompt": "x " * 100_000}, "the model's context is 4096; shorten it"),
    "prompts_many": (TEXT, {"prompt": ["x"] * 1000}, "256 prompts at most"),
    "n_zero": (TEXT, {"n": 0}, ">= 1"),
    "n_large": (TEXT, {"n": 65}, "<= 64"),
    "n_beyond_rows": (TEXT, {"n": 5}, "n is 4 at most on this server"),
    "n_huge": (TEXT, {"n": 10**30}, "Expected"),
    "n_text": (TEXT, {"n": "2"}, "got `str`"),
    "best_of": (TEXT, {"best_of": 3}, "best_of has to be n"),
    "suffix": (TEXT, {"suffix": "x"}, "leave out suffix"),
    "max_tokens_zero": (TEXT, {"max_tokens": 0}, "goes with echo only"),
    "max_tokens_negative": (TEXT, {"max_tokens": -1}, ">= 0"),
    "temperature_negative": (TEXT, {"temperature": -0.1}, ">= 0"),
    "temperature_high": (TEXT, {"temperature": 2.1}, "<= 2"),
    "temperature_text": (TEXT, {"temperature": "hot"}, "got `str`"),
    "top_p": (TEXT, {"top_p": 1.5}, "<= 1"),
    "min_p": (TEXT, {"min_p": -1}, ">= 0"),
    "penalty": (TEXT, {"presence_penalty": 3}, "<= 2"),
    "repetition": (TEXT, {"repetition_penalty": 0}, "> 0"),
    "seed": (TEXT, {"seed": 1 << 63}, "Expected"),
    "bias_name": (TEXT, {"logit_bias": {"x": 1}}, "no token id from 0 to 4095"),
    "bias_beyond": (TEXT, {"logit_bias": {"4096": 1}}, "no token id"),
    "bias_other_digits": (TEXT, {"logit_bias": {"٣": 1}}, "no token id"),
    "bias_value": (TEXT, {"logit_bias": {"1": 101}}, "<= 100"),
    "stop_empty": (TEXT, {"stop": [""]}, "length >= 1"),
    "stop_many": (TEXT, {"stop": ["x"] * 17}, "length <= 16"),
    "stop_numbers": (TEXT, {"stop": [1]}, "got `int`"),
    "stream_text": (TEXT, {"stream": "yes"}, "got `str`"),
    "logprobs": (TEXT, {"logprobs": 21}, "<= 20"),
    "unknown_field": (TEXT, {"top": 1}, "unknown field"),
    "unknown_long_field": (TEXT, {"x" * 9999: 1}, "unknown field"),
    "messages_missing": (CHAT, {"messages": None}, "got `null`"),
    "messages_empty": (CHAT, {"messages": []}, "length >= 1"),
    "message_text": (CHAT, {"messages": ["x"]}, "got `str`"),
    "role": (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "Invalid enum value"),
    "no_role": (CHAT, {"messages": [{"content": "x"}]}, "missing required field `role`"),
    "no_content": (CHAT, {"messages": [{"role": "user"}]}, "neither content nor tool_calls"),
    "image": (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "Invalid enum value"),
    "chat_long": (CHAT, {"messages": [user("x " * 5000)]}, "and the model's context is 4096"),
    "chat_zero": (CHAT, {"max_tokens": 0}, "1 at least"),
    "top_logprobs": (CHAT, {"top_logprobs": 2}, "goes with logprobs only"),
    "format": (CHAT, {"response_format": {"type": "yaml"}}, "Invalid enum value"),
    "format_no_schema": (CHAT, {"response_format": {"type": "json_schema"}}, "needs a schema"),
    "schema_wrong": (CHAT, schema({"type": "banana"}), "the schema cannot be used: Invalid type: banana"),
    "schema_reference": (CHAT, schema({"$ref": "#/nowhere"}), "the schema cannot be used"),
    "schema_remote": (CHAT, schema({"$ref": "http://localhost:1/x"}), "the schema cannot be used"),
    "schema_pattern": (CHAT, schema({"type": "string", "pattern": "("}), "the schema cannot be used"),
    "schema_deep": (CHAT, schema(nested(40)), "more than 64 levels"),
    "schema_large": (CHAT, schema({"enum": ["x" * 90] * 4000}), "characters at most"),
    "tool_name": (CHAT, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "matching regex"),
    "tool_deep": (CHAT, {"tools": [{"function": {"name": "f", "parameters": nested(300)}}]}, "more than 64 levels"),
    "tool_choice_alone": (CHAT, {"tool_choice": "required"}, "goes with tools only"),
    "tool_choice_other": (
        CHAT,
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        "not among the tools",
    ),
    "tool_schema": (
        CHAT,
        {"tools": [{"function": {"name": "f", "parameters": {"type": 3}}}], "tool_choice": "required"},
        "the schema cannot be used",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_fields(http: httpx2.Client, kind: str) -> None:
    path, change, message = WRONG[kind]
    for stream in (False, True):
        body = {"stream": stream, **BODIES[path], **change}
        error = check_refused(http.post(path, json=body))
        assert message in error["message"]
        assert error["type"] == "invalid_request_error"


RAW: dict[str, tuple[bytes, dict[str, str], int]] = {
    "empty": (b"", JSON, 400),
    "text": (b"hello", JSON, 400),
    "cut": (b'{"model": "tiny"', JSON, 400),
    "two": (b"{}{}", JSON, 400),
    "array": (b"[]", JSON, 400),
    "nan": (b'{"model":"tiny","prompt":"x","temperature":NaN}', JSON, 400),
    "infinity": (b'{"model":"tiny","prompt":"x","temperature":1e999}', JSON, 400),
    "no_utf8": (b'{"model":"tiny","prompt":"\xff\xfe"}', JSON, 400),
    "utf16": ('{"model":"tiny","prompt":"x"}'.encode("utf-16"), JSON, 400),
    "half_a_pair": (b'{"model":"tiny","prompt":"\\ud800"}', JSON, 400),
    "deep": (b"[" * 200_000, JSON, 400),
    "deep_field": (b'{"model":"tiny","metadata":' + b'{"a":' * 100_000, JSON, 400),
    "deep_tools": (b'{"model":"tiny","tools":[{"function":{"parameters":' + b'{"a":' * 100_000, JSON, 400),
    "digits": (b'{"model":"tiny","prompt":"x","n":' + b"9" * 100_000 + b"}", JSON, 400),
    "no_type": (b'{"model":"tiny","prompt":"x"}', {}, 415),
    "form": (b"model=tiny", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    "plain": (b'{"model":"tiny","prompt":"x"}', {"Content-Type": "text/plain"}, 415),
    "large": (b" " * ((8 << 20) + 1), JSON, 413),
}


@pytest.mark.parametrize("kind", RAW)
def test_wrong_bodies(http: httpx2.Client, kind: str) -> None:
    body, headers, status = RAW[kind]
    for path in BODIES if len(body) < 1 << 20 else (TEXT,):
        check_refused(http.post(path, content=body, headers=headers), (status,))


def test_bodies_without_a_length_have_a_limit_too(http: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "MOST_BODY", 1000)
    check_refused(http.post(TEXT, content=iter([b"x" * 400] * 5), headers=JSON), (413,))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/index.html", 404),
        ("POST", "/", 405),
        ("GET", "/v1", 404),
        ("GET", TEXT, 405),
        ("DELETE", CHAT, 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/none", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("POST", "/v1/embeddings", 404),
    ],
)
def test_wrong_paths(http: httpx2.Client, method: str, path: str, status: int) -> None:
    check_refused(http.request(method, path), (status,))


def test_an_unknown_model(http: httpx2.Client) -> None:
    for path, body in BODIES.items():
        error = check_refused(http.post(path, json={**body, "model": "x\n" * 90}), (404,))
        assert (error["param"], error["code"]) == ("model", "model_not_found")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(st.text(max_size=5), value, max_size=3),
    max_leaves=6,
)
FIELDS = sorted(
    {
        "model",
        "prompt",
        "messages",
        "n",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
    }
    | {"presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "seed", "stop", "stream", "user"}
    | {"stream_options", "metadata", "logprobs", "top_logprobs", "response_format", "tools", "tool_choice", "echo"}
)


CHANGES = st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(path=st.sampled_from(sorted(BODIES)), change=CHANGES)
def test_any_values_in_any_fields(http: httpx2.Client, path: str, change: dict[str, Any]) -> None:
    answer = http.post(path, content=json.dumps({**BODIES[path], **change, "max_tokens": 1}), headers=JSON)
    if answer.status_code != 200:
        check_refused(answer, (400, 404))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# a text that only its length ends
ENDLESS = {**BODIES[TEXT], "max_tokens": 3000, "prompt": "import os", "logit_bias": {"1": -100, "3": -100}}


@contextmanager
def connections(server: Server, bodies: Sequence[bytes], length: int = 0) -> Iterator[list[socket.socket]]:
    """Connections that have sent requests with these bodies, or a beginning of one of ``length`` bytes."""
    host, port = server.url.removeprefix("http://").split(":")
    with ExitStack() as stack:
        found = []
        for body in bodies:
            one = stack.enter_context(socket.create_connection((host, int(port)), timeout=20))
            head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            one.sendall(f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body)
            found.append(one)
        yield found


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_go_away_free_their_rows(server: Server, http: httpx2.Client, stream: bool) -> None:
    """In a stream, while the answer is computed, while they wait, and in the middle of their body."""
    scheduler = server.models["tiny"].scheduler
    body = json.dumps({**ENDLESS, "stream": stream}).encode()
    with connections(server, [body] * 8) as found, connections(server, [b'{"model"'] * 4, 100):
        until(lambda: scheduler.running == 4 and scheduler.waiting == 4)
        received = b""
        while stream and b"data: " not in received:
            received += found[0].recv(4096)
    until(lambda: scheduler.running == 0 and scheduler.waiting == 0)
    assert http.post(TEXT, json=BODIES[TEXT]).status_code == 200


def test_a_full_queue_says_when_to_come_back(server: Server, http: httpx2.Client) -> None:
    scheduler = server.models["tiny"].scheduler
    with connections(server, [json.dumps(ENDLESS).encode()] * 16):
        until(lambda: scheduler.running == 4 and scheduler.waiting == 12)
        answer = http.post(CHAT, json=BODIES[CHAT])
        assert check_refused(answer, (429,))["code"] == "queue_full"
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
        other = http.post(TEXT, json={**BODIES[TEXT], "model": "again"})
        assert other.status_code == 200
    until(lambda: scheduler.running == 0)
    assert http.post(CHAT, json=BODIES[CHAT]).status_code == 200


def test_what_others_ask_meanwhile_is_answered(server: Server, http: httpx2.Client) -> None:
    """A good answer stays the same between wrong requests; nothing of them stays."""
    good = {**BODIES[CHAT], "max_tokens": 8, **schema(SCHEMA)}
    first = http.post(CHAT, json=good).json()["choices"]
    for body, headers, _ in list(RAW.values())[::3]:
        http.post(CHAT, content=body, headers=headers)
        assert http.post(CHAT, json=good).json()["choices"] == first
    assert all(model.scheduler.running == 0 for model in server.models.values())
