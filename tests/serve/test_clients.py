"""The openai package and LangChain against a server: what they are told is what `generate` says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from serve_texts import LONG, SCHEMA, TOOL, user

from h1export.checkpoint.tokenizer import load_tokenizer
from h1export.commands.generate import generate_text
from h1export.runtime.generation import PREFILL_CHUNK, Sampling
from h1export.serve.server import Server

Truth = Callable[..., str]


@pytest.fixture(scope="module")
def truth(out: Path, server: Server) -> Iterator[Truth]:
    """What the command `generate` prints; the runner is the server's, so that none is loaded for every text."""

    def generated(prompt: str, tokens: int, chat: bool = False, **sampling: Any) -> str:
        how = Sampling(**sampling)
        return "".join(generate_text(out, prompt, tokens, sampling=how, chat=chat, kernels="native", threads=1))

    with pytest.MonkeyPatch.context() as patch:
        for module in ("generate", "chat"):
            patch.setattr(f"h1export.commands.{module}.load_runner", lambda *_, **__: server.models["tiny"].runner)
        yield generated


def test_models(client: openai.OpenAI, server: Server) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "again"]
    assert client.models.retrieve("again").owned_by == "h1export"
    with pytest.raises(openai.NotFoundError, match="there is no model 'nobody'; there are tiny, again"):
        client.models.retrieve("nobody")
    assert {model.name: model.context for model in server.models.values()} == {"tiny": 4096, "again": 4096}


def test_many_at_once_get_what_generate_says(client: openai.OpenAI, truth: Truth) -> None:
    """Short and long prompts, chats and texts, streams and whole answers, two models, sampled and greedy."""
    samplings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 1.5, "seed": 8, "top_p": 0.9, "min_p": 0.02, "top_k": 50},
        {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.25},
    ]
    prompts = ["import os", LONG, f"{LONG} import sys"]
    kinds = [(prompt, chat) for prompt in prompts for chat in (False, True)]
    cases = [(*kind, how) for place, kind in enumerate(kinds) for how in samplings[place % 2 :: 2]]

    def ask(number: int) -> str:
        prompt, chat, how = cases[number]
        extra = {name: how[name] for name in ("top_k", "min_p", "repetition_penalty") if name in how}
        given = {name: value for name, value in how.items() if name not in extra}
        how = {"model": ("tiny", "again")[number % 2], "max_tokens": 12, "extra_body": extra, **given}
        stream = number % 3 == 0
        endpoint: Any = client.chat.completions if chat else client.completions
        body = {"messages": [user(prompt)]} if chat else {"prompt": prompt}
        answer = endpoint.create(**how, **body, stream=stream)
        if stream:
            parts = [chunk.choices[0] for chunk in answer]
            assert [part.finish_reason is None for part in parts] == [True] * (len(parts) - 1) + [False]
            return "".join((part.delta.content if chat else part.text) or "" for part in parts)
        return str(answer.choices[0].message.content if chat else answer.choices[0].text)

    expected = [truth(prompt, 12, chat, **how) for prompt, chat, how in cases]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):  # the second time, prompts are reused
            assert list(pool.map(ask, range(len(cases)))) == expected
    assert len(set(expected)) > len(cases) / 2


def test_what_was_computed_is_reused(client: openai.OpenAI) -> None:
    """A conversation goes on from its last turn, and a text from the last call that it shares with another."""
    talk = [{"role": "system", "content": "Reuse."}, user(LONG)]
    computed = []
    for _ in range(3):
        answer = client.chat.completions.create(model="tiny", messages=talk, max_tokens=5, temperature=0)
        usage = answer.usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        computed.append((usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens))
        talk += [{"role": "assistant", "content": answer.choices[0].message.content}, user("Why?")]
    assert computed[0][1] in (0, None)
    assert [cached for _, cached in computed[1:]] == [tokens for tokens, _ in computed[:-1]]
    for number, least in enumerate((0, 0, PREFILL_CHUNK)):
        text = client.completions.create(model="again", prompt=f"Shared. {LONG} {number} and more", max_tokens=1)
        assert text.usage.prompt_tokens_details.cached_tokens >= least


def test_async_clients(server: Server, truth: Truth) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[user(f"import x{number % 3}")],
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        said, usage = "", None
        async for chunk in stream:
            said += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage
        assert usage is not None
        assert usage.completion_tokens <= 8
        return said

    async def all_of() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(9)))

    assert asyncio.run(all_of()) == [truth(f"import x{number}", 8, True) for number in range(3)] * 3


def test_choices_have_the_seeds_that_follow(client: openai.OpenAI, truth: Truth) -> None:
    answer = client.completions.create(
        model="tiny", prompt=["import os", "def"], n=3, temperature=1, seed=5, max_tokens=6
    )
    expected = [truth(prompt, 6, temperature=1.0, seed=seed) for prompt in ("import os", "def") for seed in (5, 6, 7)]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == list(range(6))
    unseeded = {
        client.completions.create(model="tiny", prompt="import os", max_tokens=12).choices[0].text for _ in range(4)
    }
    assert len(unseeded) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_stops(client: openai.OpenAI, truth: Truth, stream: bool) -> None:
    """The text ends before the first stop, also where it is in the middle of tokens."""
    whole = truth("import os", 20)
    for stop in (whole[3:8], whole[-4:], "never", [whole[10:12], whole[5:9]]):
        stops = [stop] if isinstance(stop, str) else stop
        places = [whole.find(one) for one in stops if one in whole]
        answer: Any = client.completions.create(
            model="tiny", prompt="import os", max_tokens=20, temperature=0, stop=stop, stream=stream
        )
        parts = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
        assert "".join(part.text for part in parts) == whole[: min(places, default=None)]
        assert parts[-1].finish_reason == ("stop" if places else "length")


def test_scores_are_those_of_the_logits(client: openai.OpenAI, server: Server, out: Path) -> None:
    """Of a text with its prompt, whole and in a stream, and of a chat; tokens have offsets in the text."""
    ids = load_tokenizer(out).encode(LONG).ids[: PREFILL_CHUNK + 20]
    answer = client.completions.create(model="tiny", prompt=ids, max_tokens=2, temperature=0, echo=True, logprobs=2)
    found = answer.choices[0].logprobs
    session = server.models["tiny"].runner.start(1, len(ids))
    parts = [ids[:PREFILL_CHUNK], ids[PREFILL_CHUNK:]]
    logits = np.concatenate([session.append(np.array([part]))[0] for part in parts]).astype(np.float64)
    exact = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert found is not None
    assert found.token_logprobs is not None
    assert found.token_logprobs[0] is None
    assert np.allclose(found.token_logprobs[1 : len(ids)], exact[np.arange(len(ids) - 1), ids[1:]], atol=1e-9)
    assert "".join(found.tokens) == answer.choices[0].text
    assert [answer.choices[0].text[place] for place in found.text_offset] == [token[0] for token in found.tokens]
    stream = client.completions.create(
        model="tiny", prompt=ids, max_tokens=2, temperature=0, echo=True, logprobs=2, stream=True
    )
    scores = [chunk.choices[0].logprobs.token_logprobs for chunk in stream if chunk.choices[0].logprobs]
    assert [score for part in scores for score in part] == found.token_logprobs
    alone = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=0)
    assert alone.choices[0].logprobs.token_logprobs == found.token_logprobs[: len(ids)]
    chat = client.chat.completions.create(
        model="tiny", messages=[user("x")], max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    for token in chat.choices[0].logprobs.content:
        assert token.top_logprobs[0].logprob == token.logprob  # greedy
        assert bytes(token.bytes).decode() == token.token


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_fits_its_schema(client: openai.OpenAI, stream: bool) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "pair", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        answer: Any = client.chat.completions.create(
            model="tiny", messages=[user("A pair?")], seed=seed, response_format=form, max_tokens=60, stream=stream
        )
        parts = [chunk.choices[0].delta for chunk in answer] if stream else [answer.choices[0].message]
        value = json.loads("".join(part.content or "" for part in parts))
        assert value.keys() == {"a", "b"}
        assert 0 <= value["a"] <= 99
        assert value["b"] in ("x", "y")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "pair"}}])
def test_tools_are_called(client: openai.OpenAI, choice: Any) -> None:
    asked: Any = {"model": "tiny", "messages": [user("A pair?")], "tools": [TOOL], "max_tokens": 90, "seed": 3}
    whole = client.chat.completions.create(**asked, tool_choice=choice)
    (call,) = whole.choices[0].message.tool_calls or []
    assert (whole.choices[0].finish_reason, call.function.name) == ("tool_calls", "pair")
    assert json.loads(call.function.arguments).keys() == {"a", "b"}
    stream = client.chat.completions.create(**asked, tool_choice=choice, stream=True)
    parts = [part for chunk in stream for part in chunk.choices[0].delta.tool_calls or []]
    assert [(part.index, part.function.name, part.function.arguments) for part in parts] == [
        (0, "pair", call.function.arguments)
    ]
    result: Any = [
        *asked["messages"],
        whole.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
    ]
    again = client.chat.completions.create(**{**asked, "messages": result, "max_tokens": 4}, tool_choice="auto")
    assert again.choices[0].finish_reason in ("length", "stop")


@pytest.fixture(scope="module")
def langchain(server: Server) -> Callable[..., ChatOpenAI]:
    """langchain(seed=3) -> LangChain's client of the server."""

    def made(**options: Any) -> ChatOpenAI:
        how: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 8, "max_retries": 0, "timeout": 60}
        return ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", **how | options)

    return made


def test_langchain_answers_and_streams(langchain: Callable[..., ChatOpenAI], truth: Truth) -> None:
    texts = ["import os", "def main(", "class A:"]
    expected = [truth(text, 8, True) for text in texts]
    chat = langchain()
    assert [answer.content for answer in chat.batch(texts, {"max_concurrency": 3})] == expected
    for text, said in zip(texts, expected, strict=True):
        chunks = list(chat.stream([HumanMessage(text)]))
        assert len(chunks) > 2
        assert "".join(str(chunk.content) for chunk in chunks) == said
    answer = chat.invoke([SystemMessage("Be brief."), HumanMessage("x"), AIMessage("y"), HumanMessage("z")])
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] <= 8
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    with pytest.raises(openai.NotFoundError, match="there is no model 'nobody'"):
        langchain(model="nobody").invoke("x")


@pytest.mark.parametrize("stream", [False, True])
def test_langchain_calls_tools(langchain: Callable[..., ChatOpenAI], stream: bool) -> None:
    """A call comes back parsed, and its result can be sent."""
    chat = langchain(max_tokens=90, temperature=1, seed=3)
    bound = chat.bind_tools([TOOL], tool_choice="pair")
    parts: list[Any] = list(bound.stream("A pair?")) if stream else [bound.invoke("A pair?")]
    answer = reduce(add, parts)
    (call,) = answer.tool_calls
    assert call["name"] == "pair"
    assert call["args"].keys() == {"a", "b"}
    result = ToolMessage("done", tool_call_id=call["id"])
    said = AIMessage(answer.content, tool_calls=answer.tool_calls)
    again = chat.bind_tools([TOOL]).bind(max_tokens=4).invoke([HumanMessage("A pair?"), said, result])
    assert again.response_metadata["finish_reason"] in ("stop", "length")


def test_langchain_gets_values_of_a_schema(langchain: Callable[..., ChatOpenAI]) -> None:
    schema = {"title": "pair", **SCHEMA}
    chat = langchain(max_tokens=60, temperature=1, seed=5)
    for method in ("json_schema", "function_calling"):
        value: Any = chat.with_structured_output(schema, method=method).invoke("A pair?")
        assert value.keys() == {"a", "b"}
        assert 0 <= value["a"] <= 99


def test_metrics_and_health(http: httpx2.Client, client: openai.OpenAI) -> None:
    def value(name: str) -> float:
        lines = http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    assert http.get("/health").json() == {"status": "ok"}
    generated = 'h1export_tokens_total{kind="generated",model="again"}'
    before = value(generated)
    client.completions.create(model="again", prompt="x", n=2, max_tokens=5, temperature=0, logit_bias={"5": 100})
    assert value(generated) == before + 10
    assert value('h1export_prefix_points{model="tiny"}') > 0
    assert value("h1export_waiting") == 0
    assert value("h1export_first_token_seconds_count") > 0
