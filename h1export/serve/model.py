"""ServedModel: an artifact with all that answers need, and the tasks that a request becomes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from h1export.checkpoint.chat_template import ChatTemplate
from h1export.checkpoint.conversation import Conversations
from h1export.checkpoint.tokenizer import TokenDecoder, load_tokenizer
from h1export.checkpoint.vocabulary import prompt_ids
from h1export.commands.load import load_runner, open_artifact
from h1export.model.falcon_h1.special_tokens import special_tokens
from h1export.model.falcon_h1.states import StateSpec
from h1export.runtime.generation import Sampler, Sampling
from h1export.runtime.prefix_store import PrefixStore
from h1export.serve.answers import Answer, ChatAnswer, CompletionAnswer
from h1export.serve.choice import Choice, Emit
from h1export.serve.problems import ProblemError
from h1export.serve.requests import ChatRequest, CompletionRequest, Message, NamedTool
from h1export.serve.scheduler import Scheduler, Task, Watch
from h1export.targets import Kernels

if TYPE_CHECKING:
    from h1export.serve.grammar import Grammars, Matcher

DEFAULT_TOKENS = 16  # of /v1/completions
FINGERPRINT = 12  # characters of the artifact's identity
Prepared = tuple[list[Task], Answer]


@dataclass(frozen=True)
class Room:
    """What one artifact may take.

    Attributes:
        rows: The most choices computed at once.
        queue: The most prompts that wait.
        prefix_bytes: The most bytes of kept states; 0 keeps none.
    """

    rows: int = 8
    queue: int = 64
    prefix_bytes: int = 512 << 20


class ServedModel:
    """An artifact that answers requests. Threads may share it.

    Args:
        name: What requests call it.
        out: The artifact's folder.
        room: What it may take.
        watch: What is told about the work.
        threads: The argument of ``h1export.load``.
        kernels: The argument of ``h1export.load``.
        verify: The file of the public key that must have signed the artifact, or None.

    Raises:
        H1ExportError: A damaged artifact, one that is not signed by this key, or one without a tokenizer.
    """

    def __init__(
        self,
        name: str,
        out: Path,
        room: Room,
        *,
        watch: Watch,
        threads: int = 0,
        kernels: Kernels = "auto",
        verify: Path | None = None,
    ) -> None:
        artifact = open_artifact(out, verify)
        self.name = name
        self.created = int(time.time())
        self.fingerprint = artifact.identity[:FINGERPRINT]
        self.tokenizer = load_tokenizer(out)
        self._conversations = Conversations(ChatTemplate.read(out), self.tokenizer, artifact.config)
        self.runner = load_runner(artifact, threads, kernels=kernels)
        self._end = frozenset(special_tokens(out, artifact.config).eos)
        self.store = PrefixStore(StateSpec.of(artifact.config), room.prefix_bytes) if room.prefix_bytes else None
        limit = self.runner.limits.max_context
        longest = artifact.config.max_position_embeddings
        self.context = longest if limit is None else min(limit, longest)
        self.scheduler = Scheduler(self.runner, self.store, rows=room.rows, queue=room.queue, watch=watch)
        self.token_text = lru_cache(1 << 16)(self._token_text)
        self._lock = Lock()
        self._grammars: Grammars | None = None

    def _token_text(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def prepare(self, form: ChatRequest | CompletionRequest, emit: Emit) -> Prepared:
        """Return the tasks of a request, which are to be submitted, and the answer that takes their events.

        Raises:
            ProblemError: A part of the request does not fit.
            H1ExportError: The template does not take the conversation, or a text cannot be encoded.
        """
        return self._chat(form, emit) if isinstance(form, ChatRequest) else self._completion(form, emit)

    def _chat(self, form: ChatRequest, emit: Emit) -> Prepared:
        form.check()
        with_tools = bool(form.tools) and form.tool_choice != "none"
        tools = [_tool(tool.function) for tool in form.tools or ()] if with_tools else None
        messages = [_message(message) for message in form.messages]
        ids = self._conversations.ids(messages, tools=tools)
        most = self._most(ids, form.max_completion_tokens or form.max_tokens or self.context)
        borders = self._conversations.borders(messages, ids, tools=tools)
        samplings = form.samplings(self.runner.config.vocab_size)
        choices = [
            Choice(
                index,
                Sampler(sampling, ids),
                TokenDecoder(self.tokenizer, skip_special_tokens=not with_tools),  # a tag may be a special token
                end=self._end,
                most=most,
                emit=emit,
                stops=form.stops,
                top=(form.top_logprobs or 0) if form.logprobs else None,
                grammar=self._grammar(form),
            )
            for index, sampling in enumerate(samplings)
        ]
        answer = ChatAnswer(
            self.name,
            self.fingerprint,
            len(choices),
            token_text=self.token_text,
            scored=bool(form.logprobs),
            tools=with_tools,
        )
        return [Task(ids, choices, borders)], answer

    def _completion(self, form: CompletionRequest, emit: Emit) -> Prepared:
        form.check()
        prompts = [self._ids(prompt) for prompt in form.prompts()]
        samplings = form.samplings(self.runner.config.vocab_size)
        wanted = DEFAULT_TOKENS if form.max_tokens is None else form.max_tokens
        scores_prompt = bool(form.echo) and form.logprobs is not None
        if scores_prompt and not self.runner.limits.all_logits:
            raise ProblemError(
                400, "this artifact gives logits of the last token only, and echo has none", param="echo"
            )
        tasks = []
        for place, ids in enumerate(prompts):
            most = self._most(ids, wanted)
            choices = [
                self._continuation(place * len(samplings) + number, ids, form, sampling=sampling, most=most, emit=emit)
                for number, sampling in enumerate(samplings)
            ]
            tasks.append(Task(ids, choices, top=form.logprobs if scores_prompt else None))
        answer = CompletionAnswer(
            self.name,
            self.fingerprint,
            len(prompts) * len(samplings),
            token_text=self.token_text,
            scored=form.logprobs is not None,
            echoed=[self.tokenizer.decode(ids) for ids in prompts] if form.echo else [],
            per_prompt=len(samplings),
        )
        return tasks, answer

    def _continuation(
        self, index: int, ids: list[int], form: CompletionRequest, *, sampling: Sampling, most: int, emit: Emit
    ) -> Choice:
        return Choice(
            index,
            Sampler(sampling, ids),
            TokenDecoder(self.tokenizer),
            end=self._end,
            most=most,
            emit=emit,
            stops=form.stops,
            top=form.logprobs,
        )

    def close(self) -> None:
        """End what is computed."""
        self.scheduler.close()
        self._conversations.template.process.close()

    def _ids(self, prompt: str | list[int]) -> list[int]:
        vocab_size = self.runner.config.vocab_size
        if isinstance(prompt, str):
            found = prompt_ids(self.tokenizer, prompt, self.runner.config, add_special_tokens=True)
            return [int(token) for token in found]
        if any(token >= vocab_size for token in prompt):
            raise ProblemError(400, f"a token of the prompt is not from 0 to {vocab_size - 1}", param="prompt")
        return prompt

    def _most(self, ids: Sequence[int], wanted: int) -> int:
        """Return how many tokens may follow ``ids``. Raises ProblemError where there is no room or no token."""
        if not ids:
            raise ProblemError(400, "the prompt has no tokens", param="prompt")
        if len(ids) >= self.context:
            what = f"the prompt has {len(ids)} tokens, and the model's context is {self.context}"
            raise ProblemError(400, what, param="messages", code="context_length_exceeded")
        return min(wanted, self.context - len(ids))

    def _grammar(self, form: ChatRequest) -> Matcher | None:
        """Return what restricts a choice of the request, a new one each time."""
        forced = form.tool_choice == "required" or isinstance(form.tool_choice, NamedTool)
        wanted = form.response_format
        if not forced and (wanted is None or wanted.type == "text"):
            return None
        grammars = self._loaded_grammars()
        if forced:
            chosen = form.tool_choice.function.name if isinstance(form.tool_choice, NamedTool) else None
            functions = [tool.function for tool in form.tools or () if chosen in (None, tool.function.name)]
            return grammars.of_calls(functions)
        assert wanted is not None
        schema = wanted.json_schema.schema if wanted.json_schema is not None else None
        return grammars.of_schema(schema if wanted.type == "json_schema" and schema else {"type": "object"})

    def _loaded_grammars(self) -> Grammars:
        from h1export.serve.grammar import Grammars

        with self._lock:
            if self._grammars is None:
                self._grammars = Grammars(self.tokenizer, self.runner.config.vocab_size, sorted(self._end))
            return self._grammars


def _message(message: Message) -> dict[str, Any]:
    """Return a message as templates expect it: texts joined, arguments of calls as objects."""
    content = message.content
    found: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": "".join(part.text for part in content) if isinstance(content, list) else content,
        "name": message.name,
        "reasoning_content": message.reasoning_content,
        "tool_call_id": message.tool_call_id,
    }
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    elif content is None:
        raise ProblemError(400, "a message has neither content nor tool_calls", param="messages")
    found["content"] = found["content"] or ""
    return {key: value for key, value in found.items() if value is not None}


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _tool(function: Any) -> Mapping[str, Any]:
    """Return a tool as templates expect it."""
    parts = {"name": function.name, "description": function.description, "parameters": function.parameters}
    return {"type": "function", "function": {key: value for key, value in parts.items() if value is not None}}
