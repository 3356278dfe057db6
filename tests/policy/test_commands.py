"""Every command and option of h1export that the texts mention exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import click
import pytest
from markdown_it import MarkdownIt

from h1export.cli import cli

SCRIPT_OPTION = re.compile(r'"(--[a-z][\w-]*)"')  # in argparse's calls of benchmarks/ and tools/
MARKDOWN = MarkdownIt("commonmark").enable("table")


def commands(group: click.Command = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """(words after h1export, command) of every command and group."""
    yield path, group
    if isinstance(group, click.Group):
        for name, command in group.commands.items():
            yield from commands(command, (*path, name))


def code(markdown: str) -> Iterator[str]:
    """Lines of fenced blocks, and code spans."""
    for token in MARKDOWN.parse(markdown):
        if token.type == "fence" and token.info in ("", "bash"):
            yield from token.content.splitlines()
        yield from (child.content for child in token.children or [] if child.type == "code_inline")


def calls(line: str) -> Iterator[list[str]]:
    """The words after h1export, of each call of it in a line of a shell."""
    for part in re.split(r"&&|\||;|\$\(", line):
        words = shlex.split(part.replace("'", "").replace('"', ""), comments=True)
        while words and "=" in words[0]:  # an environment variable
            words = words[1:]
        if words and PurePosixPath(words[0]).name == "h1export" and len(words) > 1:
            yield words[1:]


def unknown(words: list[str], known: Mapping[tuple[str, ...], click.Command]) -> list[str]:
    """The command, or its options, that do not exist."""
    path: tuple[str, ...] = ()
    for word in words:
        if (*path, word.rstrip(",.")) not in known:
            break
        path = (*path, word.rstrip(",."))
    if not path and words[0] != "--help":
        return [words[0]]
    options = {name for parameter in known[path].params for name in (*parameter.opts, *parameter.secondary_opts)}
    found = [word.split("=")[0].rstrip(",.)") for word in words if word.startswith("--")]
    return [f"{' '.join(path)} {word}" for word in found if word not in options | {"--help"}]


@pytest.fixture(scope="module")
def known() -> Mapping[tuple[str, ...], click.Command]:
    return dict(commands())


@pytest.fixture(scope="module")
def texts(root: Path, own_files: tuple[Path, ...]) -> Mapping[str, str]:
    """Name -> text of the current documents: not of the changelog and the design notes, which are about the past."""
    folders = (root, root / "docs")
    files = [file for file in own_files if file.suffix == ".md" and file.parent in folders and file.stem != "CHANGELOG"]
    return {file.name: file.read_text(encoding="utf-8") for file in files}


def test_commands_exist(texts: Mapping[str, str], known: Mapping[tuple[str, ...], click.Command]) -> None:
    found = [
        f"{name}: h1export {word}"
        for name, text in texts.items()
        for line in code(text)
        for words in calls(line)
        for word in unknown(words, known)
    ]
    assert found == []


def test_options_in_the_running_text_exist(
    root: Path, texts: Mapping[str, str], known: Mapping[tuple[str, ...], click.Command]
) -> None:
    scripts = [file for folder in ("benchmarks", "tools") for file in (root / folder).rglob("*.py")]
    options = {name for command in known.values() for parameter in command.params for name in parameter.opts}
    options |= {name for file in scripts for name in SCRIPT_OPTION.findall(file.read_text(encoding="utf-8"))}
    others = {"--no-deps", "--help", "--h1-artifact", "--h1-checkpoint"}  # of pip, of click, of the pytest plugin
    spans = [(name, line) for name, text in texts.items() for line in code(text) if line.startswith("--")]
    assert [(name, line) for name, line in spans if line.split()[0] not in options | others] == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("h1export build M --target ort --quant int4 --validate  # a comment --x", []),
        (".venv/bin/pip install x && .venv/bin/h1export report OUT", []),
        ("X=1 h1export eval OUT --tasks a,b --unsafe-code", []),
        ("h1export coreml lint model.mlpackage", []),
        ("h1export nothing OUT", ["nothing"]),
        ("h1export build --targets ort", ["build --targets"]),
        ("h1export coreml run x --wrong=1", ["coreml run --wrong"]),
    ],
)
def test_what_does_not_exist_is_seen(
    line: str, expected: list[str], known: Mapping[tuple[str, ...], click.Command]
) -> None:
    assert [word for words in calls(line) for word in unknown(words, known)] == expected
