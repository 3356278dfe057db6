"""Continue a text with an artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from h1export.checkpoint.tokenizer import load_tokenizer, stream
from h1export.checkpoint.vocabulary import prompt_ids
from h1export.commands.chat import Chat
from h1export.commands.load import load_runner, open_artifact
from h1export.model.falcon_h1.special_tokens import special_tokens
from h1export.runtime.generation import Sampling, generate
from h1export.targets import Kernels


def generate_text(
    out: Path,
    prompt: str,
    max_tokens: int,
    *,
    sampling: Sampling,
    chat: bool = False,
    system: str | None = None,
    state: Path | None = None,
    threads: int = 0,
    kernels: Kernels = "auto",
    verify: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Iterator[str]:
    """Stream the continuation of ``prompt`` by the artifact ``out``; with ``chat``, the prompt is a user's turn.

    ``system`` is the system message of such a chat, or None. ``state`` is a file in which `h1export chat` has saved the
    turns before this one. Either makes it a chat.

    ``verify`` is the file of the public key that must have signed the artifact, before anything of it is used.

    ``report`` is called with the reason where the artifact runs slower here than it could.

    Raises:
        H1ExportError: a damaged artifact, one that is not signed by this key, no tokenizer or chat template, a prompt
            that does not fit.
    """
    if chat or system is not None or state is not None:
        talk = Chat(
            out,
            max_tokens,
            sampling=sampling,
            threads=threads,
            kernels=kernels,
            report=report,
            state=state,
            verify=verify,
        )
        if system is not None:
            talk.system = system
        yield from talk.reply(prompt)
        return
    artifact = open_artifact(out, verify)
    tokenizer = load_tokenizer(out)
    ids = prompt_ids(tokenizer, prompt, artifact.config, add_special_tokens=True)
    runner = load_runner(artifact, threads, kernels=kernels)
    if runner.provenance.fallback:
        report(runner.provenance.fallback)
    end = frozenset(special_tokens(out, runner.config).eos)
    yield from stream(tokenizer, generate(runner, ids, max_tokens, sampling=sampling, eos=end))
