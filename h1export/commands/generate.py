"""Continue a text with an artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.chat_template import ChatTemplate, conversation
from h1export.checkpoint.tokenizer import load_tokenizer, stream
from h1export.commands.load import load_runner
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
    threads: int = 0,
    kernels: Kernels = "auto",
    report: Callable[[str], None] = lambda _: None,
) -> Iterator[str]:
    """Stream the continuation of ``prompt`` by the artifact ``out``; with ``chat``, the prompt is a user's turn.

    ``system`` is the system message of such a chat, or None.

    ``report`` is called with the reason where the artifact runs slower here than it could.

    Raises:
        H1ExportError: a damaged artifact, no tokenizer or chat template, a prompt that does not fit.
    """
    artifact = Artifact.open(out)
    tokenizer = load_tokenizer(out)
    text = ChatTemplate.read(out).render(conversation(prompt, system)) if chat else prompt
    # a chat template writes the special tokens itself
    ids = np.array(tokenizer.encode(text, add_special_tokens=not chat).ids, np.int64)
    runner = load_runner(artifact, threads, kernels=kernels)
    if runner.provenance.fallback:
        report(runner.provenance.fallback)
    end = frozenset(special_tokens(out, runner.config).eos)
    yield from stream(tokenizer, generate(runner, ids, max_tokens, sampling=sampling, eos=end))
