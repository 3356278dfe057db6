"""`h1export chat`."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from h1export.cli.common import common, kernels_option, sampling_options, say, verify_option
from h1export.cli.output import say_text, show_text
from h1export.cli.prompt import STDIN
from h1export.cli.ranges import THREADS, count
from h1export.errors import H1ExportError, as_utf8
from h1export.targets import Kernels

if TYPE_CHECKING:
    from h1export.commands.chat import Chat
    from h1export.runtime.generation import Sampling

PROMPT = "> "
HELP = """\
/reset         begin a new conversation; the system message stays
/undo          take the last turn and its reply back
/system TEXT   set the system message; without TEXT, there is none
/save FILE     write the conversation and its states; `chat OUT --state FILE` goes on from there
/help          this list
/quit          end; so does the end of the input
A line that begins with // is a turn that begins with /. Ctrl-C stops a reply."""


@cloup.command(short_help="Talk with an artifact, turn by turn.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--state", type=click.Path(path_type=Path), help="Go on from what /save has written to this file.")
@click.option("--max-tokens", default=512, show_default=True, type=count(1), help="Tokens of a reply.")
@sampling_options
@click.option("--threads", default=0, show_default=True, type=THREADS, help="0: the runtime's choice.")
@kernels_option
@verify_option
@common
def chat(
    out: Path,
    system: str | None,
    state: Path | None,
    max_tokens: int,
    sampling: Sampling,
    threads: int,
    kernels: Kernels,
    verify: Path | None,
    quiet: bool,
    as_json: bool,
) -> int:
    """Talk with the artifact OUT: a line is a turn, and the reply streams to standard output.

    States go on from turn to turn, so a turn costs its own tokens only. Where standard input is no terminal, every
    line of it is a turn, and the first error ends the chat. With --json, a reply is a line of JSON. /help lists the
    commands.

    \b
    Examples:
      h1export chat falcon-int4 --system "Answer in one sentence."
      h1export chat falcon-int4 --state talk.safetensors
      printf '%s\\n' "Who are you?" "Since when?" | h1export chat falcon-int4 --json
    """
    from h1export.commands.chat import Chat

    report = partial(say, quiet=quiet)
    talk = Chat(
        out, max_tokens, sampling=sampling, threads=threads, kernels=kernels, report=report, state=state, verify=verify
    )
    if system is not None:
        talk.system = as_utf8(system)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    for line in _typed() if terminal else _piped():
        try:
            if not _turn(talk, line, as_json=as_json):
                break
        except (H1ExportError, KeyboardInterrupt) as error:
            if not terminal:
                raise
            # Ctrl-C just before or after a reply ends nothing either
            say("" if isinstance(error, KeyboardInterrupt) else f"h1export: {error}")
    return 0


def _turn(talk: Chat, line: str, *, as_json: bool) -> bool:
    """Do what ``line`` says; return whether the chat goes on."""
    if line.startswith("/") and not line.startswith("//"):
        word, _, rest = line.partition(" ")
        return _command(talk, word, rest.strip())
    text = line[1:] if line.startswith("//") else line
    if text.strip():
        before = talk.sequence.computed
        said = ""
        with _interrupts() as stopped:
            for piece in talk.reply(text, stopped):
                said += piece
                if not as_json:
                    show_text(piece, end="")
        found = {"prompt": text, "text": said, "computed_tokens": talk.sequence.computed - before}
        show_text(json.dumps(found) if as_json else "")
    return True


def _command(talk: Chat, word: str, rest: str) -> bool:
    commands: dict[str, Callable[[], Any]] = {
        "/reset": talk.reset,
        "/undo": talk.undo,
        "/help": lambda: say_text(HELP),
        "/system": lambda: setattr(talk, "system", rest or None),
        "/save": lambda: _save(talk, rest),
        "/quit": lambda: None,
    }
    if word not in commands:
        raise H1ExportError(
            word, "is no command of the chat", "/help lists them; write // for a turn that begins with /"
        )
    if rest and word not in ("/system", "/save"):
        raise H1ExportError(word, "takes nothing after it", "leave it out")
    commands[word]()
    return word != "/quit"


def _save(talk: Chat, name: str) -> None:
    if not name:
        raise H1ExportError("/save", "has no file name", "give one, such as /save talk.safetensors")
    place = Path(name).expanduser()
    talk.save(place)
    say(f"saved to {place}")


def _typed() -> Iterator[str]:
    """Yield the lines that are typed in a terminal, with its line editing; Ctrl-C clears a line."""
    with suppress(ImportError):  # Windows' own console edits lines
        import readline  # noqa: F401  input() uses it
    while True:
        try:
            yield as_utf8(input(PROMPT))
        except KeyboardInterrupt:
            say("")
        except EOFError:
            say("")
            return


def _piped() -> Iterator[str]:
    stream: Any = getattr(sys.stdin, "buffer", sys.stdin)
    read = 0
    try:
        for line in stream:
            read += 1
            yield (line.decode("utf-8") if isinstance(line, bytes) else str(line)).rstrip("\r\n")
    except UnicodeDecodeError:
        raise H1ExportError(f"{STDIN}, line {read}", "is not UTF-8 text", "give it in UTF-8") from None
    except OSError as error:
        raise H1ExportError(STDIN, f"cannot be read ({error.strerror or error})", "give it lines of text") from None


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Count Ctrl-C instead of raising KeyboardInterrupt, which could tear states apart; yield whether there was one."""
    stopped = [False]

    def stop(*_: object) -> None:
        stopped[0] = True

    try:
        before = signal.signal(signal.SIGINT, stop)
    except ValueError:  # not in the main thread, where no signal arrives
        yield lambda: stopped[0]
        return
    try:
        yield lambda: stopped[0]
    finally:
        signal.signal(signal.SIGINT, before)
