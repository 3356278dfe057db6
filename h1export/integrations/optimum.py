"""`optimum-cli export h1export`: `h1export build` as a subcommand of optimum, with the same options."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from typing import Any

import click
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from h1export.cli import run
from h1export.cli.build import build

OWN = ("model", "out")  # optimum has its own names for these two, the same for every exporter


class H1ExportCommand(BaseOptimumCLICommand):
    """The subcommand takes ``-m MODEL OUTPUT`` as optimum's other exports do, and the options of `h1export build`."""

    COMMAND = CommandInfo(
        name="h1export", help="Export Falcon-H1 models to the runtimes that h1export knows, with int4 weights."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add every option of the click command to argparse; click checks the values later."""
        parser.add_argument(
            "-m", "--model", required=True, help="Checkpoint folder in Hugging Face layout, or a Hub id."
        )
        parser.add_argument("output", help="Folder to make.")
        for option in _options():
            text = (option.help or "").replace("%", "%%")
            if option.is_flag:
                parser.add_argument(*option.opts, dest=option.name, action="store_true", help=text)
            else:
                action = "append" if option.multiple else "store"
                parser.add_argument(*option.opts, dest=option.name, action=action, required=option.required, help=text)

    def run(self) -> None:
        given: dict[str, Any] = dict(vars(self.args))
        arguments = ["build", given["model"], "--out", given["output"]]
        for option in _options():
            value = given[str(option.name)]
            if option.is_flag:
                arguments += option.opts if value else []
            elif value is not None:
                arguments += [
                    part for item in (value if option.multiple else [value]) for part in (option.opts[0], item)
                ]
        if code := run(arguments):
            sys.exit(code)


def _options() -> Iterator[click.Option]:
    yield from (
        param
        for param in build.params
        if isinstance(param, click.Option) and param.name not in OWN and not param.hidden
    )
