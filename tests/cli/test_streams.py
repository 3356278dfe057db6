"""What a command prints arrives in any encoding, and no reader, full disk or closed stream makes it fail wrongly."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from h1export.checkpoint.resolve import embedded_model
from h1export.cli import cli, run
from h1export.cli.output import answer, say, show, show_text
from h1export.cli.streams import READER_GONE, ReaderGoneError, Stream, encodable
from h1export.cli.tables import pairs_table

ENCODINGS = ["ascii", "latin-1", "cp1252", "cp437", "shift_jis", "gb2312", "koi8-r", "cp037", "utf-16", "utf-8"]
TEXT = "é日本😀│└±[bold]:smile:x\u2026"
MAIN = [sys.executable, "-c", "from h1export.cli import main; main()"]


def stream_of(encoding: str) -> tuple[Stream, io.BytesIO]:
    raw = io.BytesIO()
    return Stream(io.TextIOWrapper(raw, encoding), True, "standard output"), raw


@given(st.text(st.characters(exclude_characters="\r\n")), st.sampled_from(ENCODINGS))
def test_what_an_encoding_has_is_kept_and_the_rest_is_escaped(text: str, encoding: str) -> None:
    stream, raw = stream_of(encoding)
    stream.write(text)
    stream.flush()
    expected = ""
    for char in text:
        try:
            char.encode(encoding)
            expected += char
        except UnicodeEncodeError:
            expected += char.encode("unicode_escape").decode()
    assert raw.getvalue() == (expected.encode(encoding) if text else b"")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_door_takes_every_character(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, sink in raw.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(sink, encoding))
    table = pairs_table(TEXT, [(TEXT, TEXT), ("more", {TEXT: 1, "b": TEXT})])
    say(TEXT)
    say(table)
    show(table)
    show_text(TEXT)
    answer({TEXT: TEXT})
    for sink in raw.values():
        shown = sink.getvalue().decode(encoding)
        assert shown.count("[bold]:smile:x") >= 4
        assert encodable("日", encoding) in shown


@pytest.mark.parametrize("words", [["inspect"], ["inspect", "--json"], ["--help"], ["nonsense"]], ids=" ".join)
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-16"])
def test_commands_print_in_every_encoding(words: list[str], encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sinks = [io.BytesIO(), io.BytesIO()]
    for name, sink in zip(("stdout", "stderr"), sinks, strict=True):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(sink, encoding))
    assert run(words) == (2 if words == ["nonsense"] else 0)
    shown = [sink.getvalue().decode(encoding) for sink in sinks]
    assert sum(map(len, shown)) > 20
    assert bool(shown[0]) != bool(shown[1])


def test_commands_print_where_a_host_calls_them_without_the_guard() -> None:
    done = CliRunner(charset="ascii").invoke(cli, ["inspect"])
    assert done.exit_code == 0
    assert "mamba_n_groups" in done.output


class Broken(io.StringIO):
    """A stream whose writes fail."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


COMMANDS = [
    ["inspect"],
    ["inspect", "--json"],
    ["--help"],
    ["build", "--help"],
    ["--version"],
    *(["completion", shell] for shell in ("bash", "zsh", "fish")),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_reader_that_left_ends_a_command_without_a_word(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Broken(errno.EPIPE))
    assert run(words) == READER_GONE
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EBADF], ids=errno.errorcode.__getitem__)
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_full_disk_is_one_line_and_code_2(
    words: list[str], number: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Broken(number))
    assert run(words) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"h1export: standard output: {os.strerror(number)}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(errno.EPIPE, 0), (errno.ENOSPC, 2)], ids=["left", "full"])
def test_messages_that_nobody_reads_do_not_stop_the_work(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Broken(number))
    monkeypatch.setattr(sys.modules["h1export.cli.inspect"], "show", say)
    assert run(["inspect"]) == code
    assert run(["inspect", str(tmp_path / "none")]) == 2


def test_a_pipe_inside_the_work_is_an_error_and_no_failed_check(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(folder: Path) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("h1export.commands.inspect.describe", broken)
    assert run(["inspect"]) == 2
    assert "has ended" in capfd.readouterr().err


def test_click_and_rich_do_not_catch_a_reader_that_left() -> None:
    assert issubclass(ReaderGoneError, SystemExit)
    assert not issubclass(ReaderGoneError, Exception)
    assert ReaderGoneError().code == READER_GONE == 141


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash in which "$@" is h1export, with pipefail."""
    command = ["bash", "-o", "pipefail", "-c", line, "bash", *MAIN]
    return subprocess.run(command, capture_output=True, env=os.environ | environment, check=False)


SHELL: dict[str, tuple[str, tuple[int, ...], str]] = {  # line, exit codes, what standard error begins with
    "head": ('"$@" inspect --json | head -n 1', (0, 141), ""),
    "gone": ('"$@" inspect | true', (141,), ""),
    "stdout closed": ('"$@" inspect >&-', (0,), ""),
    "all closed": ('"$@" inspect <&- >&- 2>&-', (0,), ""),
    "stderr gone": ('"$@" inspect /none 2> >(true) >/dev/null', (2,), ""),
    "full": ('"$@" inspect --json > /dev/full', (2,), "h1export: standard output: No space left"),
    "full without messages": ('"$@" inspect > /dev/full 2>&1', (2,), ""),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("name", SHELL)
def test_processes_end_as_a_shell_expects(name: str) -> None:
    line, codes, says = SHELL[name]
    done = shell(line)
    assert done.returncode in codes, done.stderr
    assert done.stderr.decode().startswith(says)
    assert done.stderr.count(b"\n") == bool(says)


def test_files_do_not_get_the_numbers_of_closed_streams() -> None:
    code = "from h1export.cli.streams import open_closed_streams as o; o(); exit(open('/dev/null').fileno())"
    done = subprocess.run(["bash", "-c", '"$@" <&- >&- 2>&-', "bash", sys.executable, "-c", code], check=False)
    assert done.returncode > 2


@pytest.mark.parametrize("encoding", ["ascii", "shift_jis"])
def test_a_process_prints_in_the_encoding_of_its_stream(encoding: str, tmp_path: Path) -> None:
    folder = tmp_path / "modèle 日本 [x]"
    folder.symlink_to(embedded_model())
    done = subprocess.run(
        [*MAIN, "inspect", str(folder)],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert encodable(f"checkpoint {folder}\n", encoding) in done.stdout.decode(encoding)
    assert done.stderr == b""


@pytest.mark.parametrize(
    "words", [["inspect"], ["generate", "none"], ["build", "--target", "ort", "--out"]], ids=" ".join
)
def test_arguments_that_are_not_utf_8_are_one_line(words: list[str]) -> None:
    done = subprocess.run([*MAIN, *words, b"ab\xff\x1b"], capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr == f"h1export: argument {len(words) + 1}: is not UTF-8 at byte 2; give it in UTF-8\n".encode()


@pytest.mark.parametrize("argument", ["\udcff", "a\udce6\udc97", "\ud800"], ids=ascii)  # noqa: PT014
def test_half_characters_in_arguments_are_refused(argument: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", argument]) == 2
    assert "h1export: argument 2: is not UTF-8 at" in capfd.readouterr().err
