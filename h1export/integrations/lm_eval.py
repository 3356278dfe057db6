"""Artifacts as models of lm-evaluation-harness. Importing this module registers the model "h1export"."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from h1export.artifact.files import sha256_file
from h1export.checkpoint.chat_template import ChatTemplate, template_files
from h1export.checkpoint.tokenizer import (
    CANNOT_DECODE,
    CANNOT_ENCODE,
    COMPARE,
    TOKENIZER,
    TokenDecoder,
    Tokenizer,
    load_tokenizer,
    plain_tokenizer,
)
from h1export.commands.load import load_folder
from h1export.errors import H1ExportError, native_error
from h1export.integrations.lm_eval_options import WHERE, Options, read_options
from h1export.integrations.lm_eval_scoring import NOTHING, Prefix
from h1export.model.falcon_h1.special_tokens import generation_config, special_tokens
from h1export.runtime.generation import generate
from h1export.runtime.sharing import OneCall, one_call
from h1export.targets import Kernels

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # (texts, context, continuation), as lm-eval passes them
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@register_model("h1export")
class ArtifactLM(TemplateLM):
    """A model of lm-eval over the artifact ``out``.

    It computes one row at a time; the continuations of one context share its states. It takes one list of requests at a
    time: another one at the same moment raises H1ExportError, because transformers' tokenizers are not for several
    threads.

    Args:
        out: The artifact's folder.
        threads: The argument of ``h1export.load``.
        kernels: The argument of ``h1export.load``.
        max_length: The largest number of tokens in one sequence; 0 means what the model and the runtime allow.
        batch_size: An argument that lm-eval passes; it is not used.
        max_batch_size: An argument that lm-eval passes; it is not used.
        device: An argument that lm-eval passes; it is not used.
    """

    def __init__(
        self,
        out: str | Path,
        threads: int = 0,
        kernels: Kernels = "auto",
        *,
        max_length: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self._folder = Path(out)
        self._one_call = OneCall("model of lm-eval")
        self._tokenizer = load_tokenizer(Path(out))
        self.runner = load_folder(out, threads, kernels=kernels)
        self._special = special_tokens(self._folder, self.runner.config)
        rooms = (self.runner.config.max_position_embeddings, self.runner.limits.max_context, max_length)
        self.max_length = min(room for room in rooms if room)

    @cached_property
    def tokenizer(self) -> Any:
        """A tokenizer of transformers, as in lm-eval's `hf`; it runs no code of the artifact's."""
        return plain_tokenizer(self._folder)

    @property
    def eot_token_id(self) -> int:
        """The end token: the tokenizer's, or else the model's."""
        ends = self._rows(self.tokenizer.eos_token_id, *self._special.eos)
        if not ends:
            raise H1ExportError(self._folder, "the model has no end token", "build from a checkpoint that has one")
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context: the tokenizer's begin token, or else the end token.

        It is not that of config.json, which names another token in published checkpoints.
        """
        begins = self._rows(self.tokenizer.bos_token_id)
        return begins[0] if begins else self.eot_token_id

    def _rows(self, *tokens: int | None) -> list[int]:
        """Return those tokens that the model has: transformers gives a new id to one that tokenizer.json lacks."""
        return [token for token in tokens if token is not None and token < self.runner.config.vocab_size]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of ``string``, with special tokens unless it begins with one, or they are not requested."""
        return self._encode(string, self._decode(self.prefix_token_id), add_special_tokens)

    def _encode(self, string: str, begin: str | None, special: bool | None = None) -> list[int]:
        if special is None:
            special = not has_bos_prefix(string, begin)
        with native_error(self._folder / TOKENIZER, CANNOT_ENCODE, COMPARE):
            return list(self.tokenizer.encode(string, add_special_tokens=special))

    def _decode(self, tokens: int | list[int], **options: bool) -> str:
        with native_error(self._folder / TOKENIZER, CANNOT_DECODE, COMPARE):
            return str(self.tokenizer.decode(tokens, **options))

    def _tokens(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of both by the rules of lm-eval; a context of spaces alone, which its `hf` refuses, is none.

        A continuation that disappears in the last token of its context has no ids of its own.
        """
        if context:
            before, after = self._encode_pair(context, continuation)
            return before or [self.prefix_token_id], after
        after = self.tok_encode(continuation, add_special_tokens=False)
        prefixed = after[:1] == [self.prefix_token_id]
        return (after[:1], after[1:]) if prefixed else ([self.prefix_token_id], after)

    @one_call
    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log likelihood of each continuation, and whether it is the greedy one.

        A continuation without tokens is certain: 0.0 and True.
        """
        pairs: list[Request] = [(request.args, *self._tokens(*request.args)) for request in requests]
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers = {index: NOTHING for index, (_, _, continuation) in enumerate(requests) if not continuation}
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            if index in answers:
                continue
            if len(continuation) > self.max_length:
                raise H1ExportError(
                    "request",
                    f"{len(continuation)} tokens to score, and there is room for {self.max_length}",
                    "score less",
                )
            room = self.max_length + 1 - len(continuation)  # the last token is scored and not seen
            groups[tuple(context[-room:])].append(index)
        for context_ids, indices in tqdm(groups.items(), disable=disable_tqdm, desc="contexts"):
            prefix = Prefix(self.runner, np.array(context_ids, np.int64))
            for index in indices:
                texts, _, continuation = requests[index]
                score = prefix.score(np.array(continuation, np.int64))
                answers[index] = score.log_likelihood, score.greedy
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answers[index])
        return [answers[index] for index in range(len(requests))]

    @one_call
    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log likelihood of whole texts, in windows of ``max_length`` tokens.

        The first window follows ``prefix_token_id``.
        """
        totals = []
        for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm, desc="texts"):
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            parts: list[Request] = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    @one_call
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return continuations, which are greedy unless a task samples; every request samples by a seed of its own."""
        answers = []
        model = {**generation_config(self._folder), "eos_token_id": list(self._special.eos)}
        for seed, (context, options) in enumerate(
            tqdm([request.args for request in requests], disable=disable_tqdm, desc="prompts")
        ):
            answers.append(self._continue(context, read_options(options, model, seed)))
            self.cache_hook.add_partial("generate_until", (context, options), answers[-1])
        return answers

    def _continue(self, context: str, options: Options) -> str:
        if options.new >= self.max_length:
            raise H1ExportError(
                WHERE, f"{options.new} new tokens, and there is room for {self.max_length}", "ask for fewer"
            )
        prompt = self._encode(context, self.tokenizer.bos_token) or [self.prefix_token_id]
        ids = np.array(prompt[options.new - self.max_length :], np.int64)
        new = options.new
        if options.total is not None:
            new = min(options.total, self.max_length) - len(ids)
        if new < 0 or (options.total is not None and not new):
            what = f"max_length: {options.total} leaves no room after a prompt of {len(ids)} tokens"
            raise H1ExportError(WHERE, what, "give max_gen_toks instead, the number of new tokens")
        until = [*options.until, self._decode(self.eot_token_id)]
        stops = Stops(self._tokenizer, until)
        tokens: list[int] = []
        for token in generate(self.runner, ids, new, sampling=options.sampling, eos=frozenset()):
            tokens.append(token)
            if token in self._special.eos or stops.reached(token):
                break
        text = self._decode(tokens, skip_special_tokens=True)
        return str(postprocess_generated_text(text, until, None))

    @property
    def tokenizer_name(self) -> str:
        """A name for the cache of requests, which holds prompts: another tokenizer or chat template has another one."""
        digest = hashlib.sha256()
        for name in (*TOKENIZER_FILES, *template_files(self._folder)):
            path = self._folder / name
            digest.update(sha256_file(path).encode() if path.is_file() else b"")
            digest.update(name.encode())
        return f"{self._folder.resolve().name}-{digest.hexdigest()[:12]}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the prompt of a conversation, by the artifact's chat template.

        A system turn with which the template fails is left out, as in lm-eval's `hf`.

        Raises:
            H1ExportError: The template fails without it too, or there is none.
        """
        others = [turn for turn in chat_history if turn["role"] != "system"]
        try:
            return self._rendered(chat_history, add_generation_prompt)
        except H1ExportError as error:
            if len(others) == len(chat_history):
                raise
            try:
                return self._rendered(others, add_generation_prompt)
            except H1ExportError:
                raise error from None

    def _rendered(self, turns: list[dict[str, str]], reply: bool) -> str:
        return self._template.render(turns, reply=reply, continued=not reply)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the text of the template, which lm-eval notes in its results."""
        return self._template.chosen() if chat_template else None

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate.read(self._folder)


class Stops:
    """Texts that end a continuation, found in its text, with special tokens, as it grows.

    A stop string may span tokens, and is never found in some of a character's bytes.
    """

    def __init__(self, tokenizer: Tokenizer, terms: Sequence[str]) -> None:
        self._terms = terms
        self._decoder = TokenDecoder(tokenizer, skip_special_tokens=False)
        self._tail = ""  # as much as can belong to a stop string that is not complete

    def reached(self, token: int) -> bool:
        """Return whether there is a stop string in the text that ``token`` continues."""
        self._tail += self._decoder.step(token)
        found = any(term in self._tail for term in self._terms)
        kept = max(map(len, self._terms)) - 1
        self._tail = self._tail[len(self._tail) - kept :] if kept < len(self._tail) else self._tail
        return found


def evaluate(
    model: ArtifactLM,
    tasks: Sequence[str],
    include: Path | None,
    *,
    fewshot: int | None,
    limit: int | None,
    chat: bool,
    unsafe_code: bool,
    system: str | None = None,
    options: str | None = None,
) -> dict[str, Any]:
    """Return lm-eval's results of ``tasks``, which are its own or those whose YAML files are in the folder ``include``.

    Args:
        model: The artifact.
        tasks: The names of tasks, groups and tags.
        include: A folder of further tasks.
        fewshot: The number of examples before each question; None leaves it to the task.
        limit: The number of documents of each task; None means all.
        chat: Whether prompts are framed by the chat template.
        unsafe_code: Whether tasks may run the code that the model wrote.
        system: The system message before every prompt.
        options: "KEY=VALUE,..." of the generation_kwargs, which replace those of the tasks.

    Raises:
        H1ExportError: A task does not exist, or asks for what the model does not do.
    """
    manager = TaskManager(include_path=include, include_defaults=False)
    if not {*tasks} <= {*manager.all_tasks}:  # reading all of lm-eval's takes seconds
        manager = TaskManager(include_path=include)
    if unknown := sorted({*tasks} - {*manager.all_tasks}):
        raise H1ExportError(
            "--tasks",
            f"no such task: {', '.join(unknown)}",
            "`lm-eval ls tasks` lists them; --include names a folder of others",
        )
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        num_fewshot=fewshot,
        limit=limit,
        apply_chat_template=chat,
        system_instruction=system,
        gen_kwargs=options,
        confirm_run_unsafe_code=unsafe_code,
        task_manager=manager,
        log_samples=False,
    )
    return dict(found)
