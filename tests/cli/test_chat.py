"""`h1export chat` and the chat options of `generate`: lines on a pipe, and a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from h1export.artifact.artifact import Artifact
from h1export.cli import run

pytestmark = pytest.mark.ort
OPTIONS = ("--max-tokens", "6", "--kernels", "stock")


@pytest.fixture(scope="module")
def built(tiny: Path, build: Callable[..., Artifact]) -> str:
    return str(build(tiny).folder)


@pytest.fixture
def chat(
    built: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., SimpleNamespace]:
    """chat("line", ..., options=[...]) -> exit code, standard output and error."""

    def talk(*lines: str | bytes, options: tuple[str, ...] = (), command: tuple[str, ...] = ()) -> SimpleNamespace:
        data = b"".join(line if isinstance(line, bytes) else f"{line}\n".encode() for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
        code = run([*(command or ("chat", built)), *OPTIONS, *options])
        return SimpleNamespace(code=code, **dict(zip(("out", "err"), capfd.readouterr(), strict=True)))

    return talk


def answers(text: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in text.splitlines()]


def test_lines_are_turns(chat: Callable[..., SimpleNamespace], built: str) -> None:
    found = chat("Write the module heapq.", "", "Why?", options=("--json",))
    assert (found.code, found.err) == (0, "")
    first, second = answers(found.out)
    assert (first["prompt"], second["prompt"]) == ("Write the module heapq.", "Why?")
    plain = chat("Write the module heapq.", "Why?")
    assert plain.out == f"{first['text']}\n{second['text']}\n"
    alone = chat(command=("generate", built, "Write the module heapq.", "--chat", "--json"))
    assert json.loads(alone.out)["text"] == first["text"]


def test_the_system_message_and_a_new_beginning(chat: Callable[..., SimpleNamespace], built: str) -> None:
    lines = (
        "import os",
        "/reset",
        "import os",
        "/system class",
        "/reset",
        "import os",
        "/system",
        "/reset",
        "import os",
    )
    plain, again, system, last = answers(chat(*lines, options=("--json",)).out)
    assert plain["text"] == again["text"] == last["text"]
    option = chat("import os", options=("--json", "--system", "class"))
    assert answers(option.out) == [system]
    assert int(system["computed_tokens"]) > int(plain["computed_tokens"])
    alone = chat(command=("generate", built, "import os", "--system", "class", "--json"))
    assert json.loads(alone.out)["text"] == system["text"]


def test_a_saved_chat_goes_on(chat: Callable[..., SimpleNamespace], built: str, tmp_path: Path) -> None:
    file = tmp_path / "my talk [1].safetensors"
    found = chat("import os", f"/save {file}", "Why?", "/quit", "not read", options=("--json", "--system", "Be."))
    _, expected = answers(found.out)
    again = chat("Why?", options=("--json", "--state", str(file)))
    assert answers(again.out) == [expected]
    alone = chat(command=("generate", built, "Why?", "--state", str(file), "--json"))
    assert json.loads(alone.out)["text"] == expected["text"]
    file.write_bytes(file.read_bytes()[:-1])
    for command in (("chat", built), ("generate", built, "x")):
        cut = chat("x", options=("--state", str(file)), command=command)
        assert (cut.code, cut.out, cut.err.count("\n")) == (2, "", 1)
        assert cut.err.startswith(f"h1export: {file}: ")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/what", "/what: is no command of the chat; /help lists them"),
        ("/reset now", "/reset: takes nothing after it"),
        ("/save", "/save: has no file name"),
        ("/save talk", "save: there is no reply yet"),
        (b"\xff\xfe\n", "standard input, line 1: is not UTF-8 text"),
        ("x " * 9000, "and the context is 4096; shorten it"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_an_error_ends_a_script(chat: Callable[..., SimpleNamespace], line: str | bytes, error: str) -> None:
    found = chat(line, "import os")
    assert (found.code, found.out, found.err.count("\n")) == (2, "", 1)
    assert error in found.err


def test_help_and_turns_that_begin_with_a_slash(chat: Callable[..., SimpleNamespace]) -> None:
    found = chat("/help", "//quit", "/quit", options=("--json",))
    assert "/save FILE" in found.err
    assert [answer["prompt"] for answer in answers(found.out)] == ["/quit"]
    assert chat().code == 0


class Terminal:
    """A process at a terminal."""

    def __init__(self, *words: str) -> None:
        self.pid, self.descriptor = pty.fork()
        if not self.pid:
            # a shell lets what it starts in the background ignore Ctrl-C, and so a background run of these tests
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.environ.update(TERM="dumb", OMP_NUM_THREADS="1")
            os.execv(sys.executable, [sys.executable, "-c", "from h1export.cli import main; main()", *words])
        self.seen = ""

    def sees(self, text: str, seconds: float) -> bool:
        """Read until ``text`` has been seen again; return False where it has not been within ``seconds``."""
        end = time.monotonic() + seconds
        while text not in self.seen and (left := end - time.monotonic()) > 0:
            if select.select([self.descriptor], [], [], left)[0]:
                try:
                    self.seen += os.read(self.descriptor, 4096).decode(errors="replace")
                except OSError:  # the process has ended
                    break
        if text not in self.seen:
            return False
        self.seen = self.seen.split(text, 1)[1]
        return True

    def until(self, text: str) -> None:
        assert self.sees(text, 120), self.seen

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def quit(self) -> int:
        """End the chat, and return its exit code."""
        self.type("/quit\n")
        for _ in range(240):
            self.sees("no such text", 0.25)  # reads, because a full terminal would hold the process up
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.25)  # once the terminal is closed, reading does not wait
        raise AssertionError(self.seen)


def test_a_terminal(built: str, tmp_path: Path) -> None:
    """Errors do not end the chat; Ctrl-C ends the reply, or clears the line, and nothing else."""
    terminal = Terminal("chat", built, "--max-tokens", "3500", "--kernels", "stock")
    try:
        terminal.until("> ")
        terminal.type("/what\n")
        terminal.until("is no command")
        terminal.until("> ")
        terminal.type("half a li")
        terminal.until("half a li")
        time.sleep(0.5)  # CPython's readline misses a signal between the echo of a key and its wait for the next one
        terminal.type("\x03")
        terminal.until("> ")
        terminal.type("Write the module heapq.\n")
        terminal.until("heapq.\r\n")
        terminal.until("e")  # a reply of many lines has begun
        terminal.type("\x03")
        terminal.until("> ")
        terminal.type(f"/save {tmp_path / 'talk'}\n")
        terminal.until("saved to")
        assert terminal.quit() == 0
    finally:
        with suppress(ProcessLookupError):
            os.kill(terminal.pid, signal.SIGKILL)
        os.close(terminal.descriptor)
    assert (tmp_path / "talk").stat().st_size > 1000


@pytest.mark.parametrize(
    "words", [("generate", "OUT", "a"), ("generate", "OUT", "a", "--chat"), ("chat", "OUT")], ids=len
)
def test_only_what_the_key_has_signed_runs(
    words: tuple[str, ...], chat: Callable[..., SimpleNamespace], built: str, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(built, tmp_path / "out"))
    key = tmp_path / "key.pem"
    key.write_bytes(
        Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    command = (*(str(out) if word == "OUT" else word for word in words), "--verify", str(key))
    assert "is not signed" in chat("a", command=command).err
    assert run(["sign", str(out), "--key", str(key)]) == 0
    assert chat("a", command=command).code == 0
    (out / "tokenizer.json").write_text((out / "tokenizer.json").read_text() + " ")
    refused = chat("a", command=command)
    assert (refused.code, refused.out) == (2, "")
    assert "tokenizer.json: has" in refused.err
