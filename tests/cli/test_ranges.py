"""Every whole number on the command line has a range, and what is outside it is refused before any work."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest

from h1export.cli import cli, run
from h1export.cli.ranges import MOST_COUNT, MOST_SEED


def numbers(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Option]]:
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from numbers(inner, (*words, name))
        return
    for param in command.params:
        if isinstance(param, click.Option) and isinstance(param.type, click.types.IntParamType):
            yield words, param


NUMBERS = {f"{' '.join(words)} {option.opts[-1]}": (words, option) for words, option in numbers(cli)}


def test_there_are_such_options() -> None:
    assert {"generate --threads", "generate --seed", "validate --prompts", "bench --depth"} <= NUMBERS.keys()


@pytest.mark.parametrize("name", NUMBERS)
def test_a_range_has_both_ends(name: str) -> None:
    kind = NUMBERS[name][1].type
    assert isinstance(kind, click.IntRange)
    assert kind.min is not None
    assert kind.min >= 0
    assert kind.max is not None
    assert kind.max <= (MOST_SEED if name.endswith("seed") else MOST_COUNT)


@pytest.mark.parametrize("value", ["-1", str(1 << 63), "9" * 5000, "nan", "1e3", ""])
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_outside_is_refused_by_name(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, option = NUMBERS[name]
    assert run([*words, option.opts[-1], value, "--json"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "internal error" not in said.err
    assert "is not in the range ." not in said.err
    assert all(len(line) <= 300 for line in said.err.splitlines())
