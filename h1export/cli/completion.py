"""`h1export completion`."""

from __future__ import annotations

import click
import cloup
from click.shell_completion import get_completion_class

from h1export.cli.output import show_text


@cloup.command(short_help="Print a shell's completion script.")
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion(context: click.Context, shell: str) -> int:
    """Print the completion script of SHELL, for example for: eval "$(h1export completion bash)"."""
    script = get_completion_class(shell)
    assert script is not None
    show_text(script(context.find_root().command, {}, "h1export", "_H1EXPORT_COMPLETE").source())
    return 0
