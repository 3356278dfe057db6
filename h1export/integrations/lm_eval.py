"""Artifacts as models of lm-evaluation-harness. Importing this module registers the model "h1export"."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from h1export.checkpoint.chat_template import ChatTemplate
from h1export.checkpoint.tokenizer import load_tokenizer, plain_tokenizer, stream
from h1export.commands.load import load_folder
from h1export.errors import H1ExportError
from h1export.integrations.lm_eval_scoring import Prefix
from h1export.model.falcon_h1.special_tokens import special_tokens
from h1export.runtime.generation import Sampling, generate
from h1export.targets import Kernels

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # (texts, context, continuation), as lm-eval passes them
MAX_NEW_TOKENS = 256  # for a task that sets no limit, as in lm-eval's own models
SAMPLING = ("temperature", "top_k", "top_p")


@register_model("h1export")
class ArtifactLM(TemplateLM):
    """A model of lm-eval over the artifact ``out``.

    It computes one row at a time; the continuations of one context share its states.

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
        self._tokenizer = load_tokenizer(Path(out))
        self.runner = load_folder(out, threads, kernels=kernels)
        self._special = special_tokens(self._folder, self.runner.config)
        rooms = (self.runner.config.max_position_embeddings, self.runner.limits.max_context, max_length)
        self.max_length = min(room for room in rooms if room)

    @property
    def eot_token_id(self) -> int:
        if not self._special.eos:
            raise H1ExportError(self._folder, "the model has no end token", "build from a checkpoint that has one")
        return self._special.eos[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return self.eot_token_id if self._special.bos is None else self._special.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of ``string``, with special tokens unless it begins with one, or they are not requested."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self._tokenizer.id_to_token(self.prefix_token_id))
        return list(self._tokenizer.encode(string, add_special_tokens=add_special_tokens).ids)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise H1ExportError(
                    "request",
                    f"{len(continuation)} tokens to score, and there is room for {self.max_length}",
                    "score less",
                )
            room = self.max_length + 1 - len(continuation)  # the last token is scored and not seen
            groups[tuple(context[-room:])].append(index)
        answers: dict[int, tuple[float, bool]] = {}
        for context_ids, indices in tqdm(groups.items(), disable=disable_tqdm, desc="contexts"):
            prefix = Prefix(self.runner, np.array(context_ids, np.int64))
            for index in indices:
                texts, _, continuation = requests[index]
                score = prefix.score(np.array(continuation, np.int64))
                answers[index] = score.log_likelihood, score.greedy
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answers[index])
        return [answers[index] for index in range(len(requests))]

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

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return continuations, which are greedy unless a task samples; the seed of sampling is the request's index."""
        answers = []
        for seed, (context, options) in enumerate(
            tqdm([request.args for request in requests], disable=disable_tqdm, desc="prompts")
        ):
            answers.append(self._continue(context, dict(options), seed))
            self.cache_hook.add_partial("generate_until", (context, options), answers[-1])
        return answers

    def _continue(self, context: str, options: dict[str, Any], seed: int) -> str:
        chosen: dict[str, Any] = dict(normalize_gen_kwargs(options, MAX_NEW_TOKENS))
        until = [term for term in chosen.pop("until") if term]
        new = chosen.pop("max_gen_toks")
        sampled = chosen.pop("do_sample")
        how = {name: chosen.pop(name) for name in SAMPLING if name in chosen}
        if chosen:
            raise H1ExportError(
                "generate_until", f"no such way to choose tokens: {', '.join(chosen)}", f"know {', '.join(SAMPLING)}"
            )
        if new >= self.max_length:
            raise H1ExportError(
                "generate_until", f"{new} new tokens, and there is room for {self.max_length}", "ask for fewer"
            )
        ends = {token for term in until if (token := self._tokenizer.token_to_id(term)) is not None}
        ids = np.array(self.tok_encode(context)[new - self.max_length :], np.int64)
        tokens = generate(
            self.runner,
            ids,
            new,
            sampling=Sampling(**how, seed=seed) if sampled else Sampling(),
            eos=frozenset({*self._special.eos, *ends}),
        )
        text = ""
        for piece in stream(self._tokenizer, tokens):
            text += piece
            if any(term in text for term in until):
                break
        return str(postprocess_generated_text(text, until, None))

    @cached_property
    def tokenizer(self) -> Any:
        """A tokenizer of transformers, which runs no code of the artifact's."""
        return plain_tokenizer(self._folder)

    @property
    def tokenizer_name(self) -> str:
        return self._folder.resolve().name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the prompt of a conversation, by the artifact's chat template."""
        return self._template.render(chat_history, reply=add_generation_prompt, continued=not add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the text of the template, which lm-eval notes in its results."""
        return self._template.chosen() if chat_template else None

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate.read(self._folder)


def evaluate(
    model: ArtifactLM,
    tasks: Sequence[str],
    include: Path | None,
    *,
    fewshot: int | None,
    limit: int | None,
    chat: bool,
    unsafe_code: bool,
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

    Raises:
        H1ExportError: A task does not exist.
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
        confirm_run_unsafe_code=unsafe_code,
        task_manager=manager,
        log_samples=False,
    )
    return dict(found)
