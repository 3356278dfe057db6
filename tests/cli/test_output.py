"""What commands print of names, paths and messages is what they are: no markup, no escapes, no broken lines."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from h1export.cli import run
from h1export.cli.junit import to_junit
from h1export.cli.output import Sheet, say, say_text, show, show_text
from h1export.cli.tables import ProgressBars, gate_table, pairs_table, report_tables
from h1export.report.checks import CheckKind, Comparison
from h1export.report.report import Report, Row
from h1export.validate.speed.gate_file import Gate
from h1export.validate.speed.regression import GateReport

CLI = Path(__file__).parents[2] / "h1export" / "cli"
MARKUP = "[bold]x[/] [/] [red :smile: [link=http://x] \\[ {{ y }} %s"
CONTROL = "\x1b[31m\r\a\x9b\u202e\x1b]0;title\x07"
ESCAPED = r"\x1b[31m\r\x07\x9b\u202e\x1b]0;title\x07"
LONG = "/" + "/".join(f"a folder {i} [b]" for i in range(60))
HOSTILE = f"{MARKUP} {CONTROL} {LONG}"
SHOWN = f"{MARKUP} {ESCAPED} {LONG}"


def hostile_sheets() -> dict[str, Callable[[], Sheet]]:
    row = Row(CheckKind.CASE, Comparison.STORED, case=HOSTILE, figures={"logits": 1.0}, tolerances={"logits": 0.1})
    report = Report({}, {}, (row,))
    gate = GateReport(HOSTILE, Gate("ort", "int4"), {}, checks=())
    return {
        "title": lambda: pairs_table(HOSTILE, []),
        "name": lambda: pairs_table("x", [(HOSTILE, 1)]),
        "value": lambda: pairs_table("x", [("name", HOSTILE)]),
        "values": lambda: pairs_table("x", [("name", {"a": HOSTILE})]),
        "key": lambda: pairs_table("x", [("name", {HOSTILE: 1})]),
        "report": lambda: report_tables(report)[1 - row.compares_outputs],
        "gate": lambda: gate_table(gate),
        "note": lambda: Sheet(pairs_table("x", []).table, notes=(HOSTILE,)),
    }


@pytest.mark.parametrize("name", hostile_sheets())
def test_tables_show_data_as_it_is_and_whole(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    sheet = hostile_sheets()[name]()
    show(sheet)
    say(sheet)
    for shown in capfd.readouterr():
        assert SHOWN in shown


def test_lines_and_texts_show_data_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE)
    say_text(HOSTILE)
    show(HOSTILE)
    show_text(HOSTILE)
    show_text("a\n\tb\x1b", end="")
    out, err = capfd.readouterr()
    assert err == f"{SHOWN}\n" * 2
    assert out == f"{SHOWN}\n" * 2 + "a\n\tb\\x1b"


def test_a_table_in_a_terminal_breaks_no_word(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Console, "is_terminal", property(lambda self: True))
    monkeypatch.setenv("COLUMNS", "40")
    path = LONG.replace(" ", "_")
    row = Row(CheckKind.TEXT, Comparison.SOURCE, figures={"ratio": 1.0}, note=f"some words and {path} and more")
    for sheet in (pairs_table("x", [("a", LONG)]), report_tables(Report({}, {}, (row,)))[1]):
        show(sheet)
        out = capfd.readouterr().out
        assert LONG in out or path in out


@pytest.mark.parametrize("words", [[], ["--json"]], ids=str)
@pytest.mark.parametrize("name", ["[bold]x", ":smile:", "a b", "[]", "é", "%s", "a" * 200, "{x}"])
def test_a_folders_name_is_printed_as_it_is(
    name: str, words: list[str], tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / name
    assert run(["inspect", str(folder), *words]) == 2
    assert capfd.readouterr().err.startswith(f"h1export: {folder}: no such folder")
    folder.symlink_to(tiny)
    assert run(["inspect", str(folder), *words]) == 0
    out = capfd.readouterr().out
    assert words or out.startswith(f"checkpoint {folder}\n")


@pytest.mark.parametrize("words", [["inspect", "X"], ["X"], ["build", "--target", "X"], ["trace", "a", "X"]], ids=str)
def test_mistakes_show_what_was_typed_without_its_control_characters(
    words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([CONTROL + MARKUP if word == "X" else word for word in words]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert not set(err) & set("\x1b\r\a\x9b\u202e")
    assert ":smile:" in err


def test_what_a_mistake_shows_of_a_long_text_is_short(capfd: pytest.CaptureFixture[str]) -> None:
    for words in (["inspect", "x" * 100_000], ["generate", "a", "b", "x" * 100_000], ["x" * 100_000]):
        assert run(words) == 2
        assert max(map(len, capfd.readouterr().err.splitlines())) <= 320


def test_names_of_tensors_and_keys_of_a_checkpoint_control_nothing(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "x"))
    config = folder / "config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("{", '{"\\u001b[31m[bold]:smile:": null, ', 1), encoding="utf-8")
    for words in ([], ["--json"], ["--debug"]):
        run(["inspect", str(folder), *words])
        shown = "".join(capfd.readouterr())
        assert "\x1b" not in shown
        assert "[bold]:smile:" in shown


def test_a_gates_xml_is_xml_whatever_the_names_are() -> None:
    text = to_junit(GateReport(HOSTILE, Gate("ort", "int4"), {}, checks=()))
    assert ElementTree.fromstring(text).get("name") == f"h1export gate {SHOWN}"


def test_stages_are_no_markup() -> None:
    with ProgressBars(quiet=False) as bars:
        bars.stage(HOSTILE, 10)
        bars.advance(5)
        (task,) = bars._progress.tasks
        assert task.description == SHOWN


def printing(tree: ast.AST) -> Iterator[str]:
    """The calls in a module that print past output.py."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("print", "click.echo", "cloup.echo", "click.secho", "Console"):
                yield called


def test_only_output_prints() -> None:
    allowed = {"output.py": ["Console"], "tables.py": ["Console"]}  # the latter for progress bars
    for file in sorted(CLI.glob("*.py")):
        found = list(printing(ast.parse(file.read_text(encoding="utf-8"))))
        assert found == allowed.get(file.name, []), f"{file.name}: print by the functions of output.py"
    assert len(list(printing(ast.parse("print(1); click.echo(2); Console().print(3)")))) == 3
