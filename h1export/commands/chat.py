"""Chat: a conversation with an artifact, whose states go on from turn to turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from h1export.checkpoint.chat_template import ChatTemplate
from h1export.checkpoint.conversation import ASSISTANT, USER, Conversations
from h1export.checkpoint.tokenizer import load_tokenizer, stream
from h1export.commands.load import load_runner, open_artifact
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.special_tokens import special_tokens
from h1export.runtime.continued import ContinuedSequence, StoppedError
from h1export.runtime.generation import Sampler, Sampling, new_tokens
from h1export.runtime.sharing import OneCall, OneReader, one_call
from h1export.runtime.state_file import StateFile
from h1export.targets import Kernels

SYSTEM = "system"


class Chat:
    """A conversation with an artifact.

    Each turn renders the whole conversation by the chat template, and computes only the tokens that the states have not
    seen; so a template may change what it wrote for earlier turns. It takes one call at a time, and a reply is a call
    until its iterator ends or is closed: another reply, a save or a change meanwhile raises H1ExportError.

    Attributes:
        messages: The conversation so far.
        sequence: The tokens and states.
    """

    def __init__(
        self,
        out: Path,
        max_tokens: int,
        *,
        sampling: Sampling,
        threads: int = 0,
        kernels: Kernels = "auto",
        report: Callable[[str], None] = lambda _: None,
        state: Path | None = None,
        verify: Path | None = None,
    ) -> None:
        """Load the artifact ``out``, and the conversation in the file ``state``.

        Args:
            out: The artifact's folder.
            max_tokens: The most tokens of a reply.
            sampling: How tokens are chosen; its seed is that of the whole conversation.
            threads: The argument of ``h1export.load``.
            kernels: The argument of ``h1export.load``.
            report: Is called with the reason where the artifact runs slower here than it could.
            state: A file that ``save`` wrote.
            verify: The file of the public key that must have signed the artifact, or None.

        Raises:
            H1ExportError: A damaged artifact, one that is not signed by this key, no tokenizer or chat template, or a
                file of another artifact.
        """
        artifact = open_artifact(out, verify)
        self._identity = artifact.identity
        self._one_call = OneCall("conversation")
        self._tokenizer = load_tokenizer(out)
        template = ChatTemplate.read(out)
        template.chosen()  # says now that there is none
        self._conversations = Conversations(template, self._tokenizer, artifact.config)
        read = None if state is None else StateFile.read(state, self._identity, artifact.config)
        self._runner = load_runner(artifact, threads, kernels=kernels)
        if self._runner.provenance.fallback:
            report(self._runner.provenance.fallback)
        self._end = frozenset(special_tokens(out, self._runner.config).eos)
        self._max_tokens = max_tokens
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self.messages: list[dict[str, Any]] = [] if read is None else [dict(message) for message in read.messages]
        self.sequence = ContinuedSequence(self._runner, None if read is None else read.sequence)

    @property
    def system(self) -> str | None:
        """The system message, with which the conversation begins; None where it has none."""
        has_one = bool(self.messages) and self.messages[0]["role"] == SYSTEM
        return str(self.messages[0]["content"]) if has_one else None

    @system.setter
    @one_call
    def system(self, text: str | None) -> None:
        others = self.messages if self.system is None else self.messages[1:]
        self.messages = others if text is None else [{"role": SYSTEM, "content": text}, *others]

    @one_call
    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = self.messages[: 0 if self.system is None else 1]

    @one_call
    def undo(self) -> None:
        """Take the last turn and its reply back; the next turn goes on from the states before them.

        Raises:
            H1ExportError: There is no turn.
        """
        if not any(message["role"] == USER for message in self.messages):
            raise H1ExportError("undo", "there is no turn yet", "write one first")
        turn = max(place for place, message in enumerate(self.messages) if message["role"] == USER)
        self.messages = self.messages[:turn]

    def reply(self, text: str, stop: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Add a user's turn, and return the model's reply piece by piece; then both are in the conversation.

        Where the reply ends early, because ``stop`` says so or the caller closes the iterator, what was yielded is the
        reply. Where it does not begin, because of an error or of ``stop``, the turn is as if it had never been.

        Raises:
            H1ExportError: The template does not take the turn, the conversation does not fit the context, or another
                reply is being read.
        """
        return OneReader(self._reply(text, stop), "reply")

    def _reply(self, text: str, stop: Callable[[], bool]) -> Iterator[str]:
        with self._one_call:
            yield from self._replied(text, stop)

    def _replied(self, text: str, stop: Callable[[], bool]) -> Iterator[str]:
        messages = [*self.messages, {"role": USER, "content": text}]
        prompt = self._conversations.ids(messages)
        try:
            logits = self.sequence.become(prompt, [self._conversations.last_border(messages, prompt)], stop)
        except StoppedError:
            return
        said = ""
        tokens = new_tokens(
            logits,
            self.sequence.append,
            min(self._max_tokens, self.sequence.context - len(prompt)),
            choose=Sampler(self._sampling, prompt, self._random).choose,
            eos=self._end,
        )
        try:
            for piece in stream(self._tokenizer, _until(tokens, stop)):
                said += piece
                yield piece
        finally:
            self.messages = [*messages, {"role": ASSISTANT, "content": said}]

    @one_call
    def save(self, path: Path) -> None:
        """Write the conversation and its states to ``path``.

        Raises:
            H1ExportError: There is nothing to save yet, or it cannot be written there.
        """
        if not any(message["role"] == ASSISTANT for message in self.messages):
            raise H1ExportError("save", "there is no reply yet", "save after a reply")
        StateFile(self._identity, self.messages, self.sequence.save()).write(path)


def _until(tokens: Iterator[int], stop: Callable[[], bool]) -> Iterator[int]:
    """Yield the tokens until ``stop`` says so; it is asked before each one is computed."""
    while not stop():
        try:
            yield next(tokens)
        except StopIteration:
            return
