"""`h1export generate`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import cloup

from h1export.cli.common import answer, common, kernels_option, sampling_options, say, verify_option
from h1export.cli.output import show_text
from h1export.cli.prompt import read_prompt
from h1export.cli.ranges import THREADS, count
from h1export.errors import as_utf8
from h1export.targets import Kernels

if TYPE_CHECKING:
    from h1export.runtime.generation import Sampling


@cloup.command(short_help="Continue a text with an artifact.")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--file", type=click.Path(path_type=Path), help="Read the prompt from this file; -: standard input.")
@click.option("--max-tokens", default=128, show_default=True, type=count(1), help="New tokens at most.")
@sampling_options
@click.option("--chat", is_flag=True, help="PROMPT is a user's turn, framed by the chat template.")
@click.option("--system", metavar="TEXT", help="System message of the chat; implies --chat.")
@click.option("--state", type=click.Path(path_type=Path), help="PROMPT is the next turn of a chat that /save wrote.")
@click.option("--threads", default=0, show_default=True, type=THREADS, help="0: the runtime's choice.")
@kernels_option
@verify_option
@common
def generate(
    out: Path,
    prompt: str | None,
    file: Path | None,
    max_tokens: int,
    sampling: Sampling,
    chat: bool,
    system: str | None,
    state: Path | None,
    threads: int,
    kernels: Kernels,
    verify: Path | None,
    quiet: bool,
    as_json: bool,
) -> int:
    """Continue PROMPT with the artifact OUT; the text streams to standard output.

    A PROMPT of - is standard input, and so is none where a pipe feeds it; one line end at the end is left out. Control
    characters of the text other than newlines and tabs are printed as escapes; --json has them all.

    \b
    Examples:
      h1export generate tiny-ort-int4 "import os"
      h1export generate falcon-int4 --file prompt.txt
      git diff | h1export generate falcon-int4 -
      h1export generate falcon-int4 "Who are you?" --chat --temperature 0.7 --top-p 0.9 --seed 1
    """
    from h1export.commands.generate import generate_text

    prompt = read_prompt(prompt, file)
    text = ""
    for piece in generate_text(
        out,
        prompt,
        max_tokens,
        sampling=sampling,
        chat=chat,
        system=None if system is None else as_utf8(system),
        state=state,
        threads=threads,
        kernels=kernels,
        verify=verify,
        report=partial(say, quiet=quiet),
    ):
        text += piece
        if not as_json:
            show_text(piece, end="")
    if as_json:
        answer({"prompt": prompt, "text": text})
    else:
        show_text("")
    return 0
