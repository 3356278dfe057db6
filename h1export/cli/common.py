"""The options that commands share; what they print with is in output.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from h1export.cli.output import answer, say
from h1export.cli.ranges import SEED, count
from h1export.targets import all_kernels

__all__ = [
    "adapter_folders",
    "adapter_option",
    "answer",
    "common",
    "kernels_option",
    "sampling_options",
    "say",
    "verify_option",
]


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
    type=click.Choice(all_kernels()),
    default="auto",
    show_default=True,
    help="native: h1export's own, of the installed wheel or else compiled when first used; compiled: h1export's own, "
    "always compiled here; stock: the runtime's; auto: native where they are to be had; another name: that runtime's, "
    "for artifacts that run in it too.",
)


def sampling_options(command: Callable[..., int]) -> Callable[..., int]:
    """Add the options of ``Sampling`` to ``command``, which gets them as its argument ``sampling``."""

    @wraps(command)
    def with_sampling(*arguments: Any, **options: Any) -> int:
        from h1export.runtime.generation import Sampling

        chosen = {name: options.pop(name) for name in SAMPLING}
        return command(*arguments, sampling=Sampling(**chosen), **options)

    wrapped: Callable[..., int] = with_sampling
    for option in reversed(SAMPLING.values()):
        wrapped = option(wrapped)
    return wrapped


SAMPLING: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "temperature": click.option("--temperature", default=0.0, show_default=True, help="0: greedy."),
    "top_k": click.option(
        "--top-k", default=0, show_default=True, type=count(), help="Sample among the k likeliest tokens; 0: all."
    ),
    "top_p": click.option(
        "--top-p", default=1.0, show_default=True, help="Sample among the likeliest tokens up to this probability."
    ),
    "min_p": click.option(
        "--min-p",
        default=0.0,
        show_default=True,
        help="Sample tokens of at least this share of the likeliest one's chance.",
    ),
    "presence_penalty": click.option(
        "--presence-penalty", default=0.0, show_default=True, help="Subtract it from logits of tokens generated before."
    ),
    "frequency_penalty": click.option(
        "--frequency-penalty", default=0.0, show_default=True, help="Subtract it for each time that they were."
    ),
    "repetition_penalty": click.option(
        "--repetition-penalty",
        default=1.0,
        show_default=True,
        help="Divide positive logits of tokens before by it, and multiply negative ones; 1: none.",
    ),
    "seed": click.option("--seed", default=0, show_default=True, type=SEED, help="Seed of the sampling."),
}


verify_option = click.option(
    "--verify",
    type=click.Path(path_type=Path),
    metavar="KEY",
    help="File with the public key that must have signed OUT, see `h1export sign`.",
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
