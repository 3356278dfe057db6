"""`h1export trace`."""

from __future__ import annotations

import dataclasses

import click
import cloup

from h1export.cli.common import answer, common
from h1export.cli.output import show_text


@cloup.command(short_help="Print the graph that targets receive.")
@click.argument("model", required=False)
@click.option(
    "--after", metavar="PASS", help="Show the program after this pass; none: before all [default: after all]."
)
@click.option("--all-layers", is_flag=True, help="Show every layer instead of the first one. --json always does.")
@common
def trace(model: str | None, after: str | None, all_layers: bool, quiet: bool, as_json: bool) -> int:
    """Print the graph of MODEL that targets receive.

    The listing has inputs, outputs, weights and nodes with their dtypes and shapes, and how many places each pass has
    rewritten.

    \b
    Examples:
      h1export trace
      h1export trace ./Falcon-H1-0.5B --after fold_decay --all-layers
    """
    from h1export.checkpoint import resolve
    from h1export.commands.trace import traced
    from h1export.graphs.render import Listing

    listing = Listing.of(traced(resolve.resolve(model), after))
    if as_json:
        answer(dataclasses.asdict(listing))
    elif not quiet:
        show_text(listing.text(all_layers))
    return 0
