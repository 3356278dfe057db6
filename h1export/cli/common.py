"""The options that commands share; what they print with is in output.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from h1export.cli.output import answer, say
from h1export.targets import Kernels

__all__ = ["adapter_folders", "adapter_option", "answer", "common", "kernels_option", "say"]


F = TypeVar("F", bound=Callable[..., Any])


def common(command: F) -> F:
    """Add --json, --quiet and --debug to ``command``; ``cli.run`` has read --debug already."""
    for option in (
        click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks."),
        click.option("--quiet", is_flag=True, help="No progress and no tables."),
        click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON."),
    ):
        command = option(command)
    return command


kernels_option = click.option(
    "--kernels",
    type=click.Choice(get_args(Kernels)),
    default="auto",
    show_default=True,
    help="native: h1export's own, compiled when first used; stock: the runtime's; auto: native where they compile.",
)


adapter_option = click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="DIR",
    help="LoRA adapter in PEFT's layout to merge into the weights: a folder or a Hub id. Repeatable, in order.",
)


def adapter_folders(adapters: Sequence[str]) -> tuple[Path, ...]:
    """Return the folders of --adapter arguments; raise H1ExportError for one that is neither a folder nor a Hub id."""
    from h1export.checkpoint.resolve import resolve_folder

    return tuple(resolve_folder(adapter) for adapter in adapters)
