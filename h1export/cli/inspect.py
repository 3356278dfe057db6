"""`h1export inspect`."""

from __future__ import annotations

import click
import cloup

from h1export.cli.common import answer, common
from h1export.cli.output import show


@cloup.command(short_help="Describe a checkpoint or an artifact.")
@click.argument("folder", required=False, metavar="MODEL|OUT")
@common
def inspect(folder: str | None, quiet: bool, as_json: bool) -> int:
    """Describe a checkpoint or an artifact, and check that it is complete and undamaged."""
    from h1export.checkpoint import resolve
    from h1export.cli.tables import pairs_table
    from h1export.commands.inspect import describe

    path = resolve.resolve(folder)
    found = describe(path)
    if as_json:
        answer(found)
    elif not quiet:
        config = found.pop("config")
        show(pairs_table(f"{found.pop('kind')} {path}", found.items()))
        show(pairs_table("architecture", config.items()))
    return 0
