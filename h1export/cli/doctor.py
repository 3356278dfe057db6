"""`h1export doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import click
import cloup

from h1export.cli.common import adapter_folders, adapter_option, answer, common, say
from h1export.cli.output import show_text
from h1export.errors import H1ExportError


@cloup.command(short_help="Say whether an artifact fits this machine.")
@click.argument("artifact", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("model", required=False)
@click.option("--build", is_flag=True, help="Build what is missing, such as the engine for this GPU.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write what was found to this .json file, and the same as a page to a .md file beside it.",
)
@adapter_option
@common
def doctor(
    artifact: Path,
    model: str | None,
    build: bool,
    *,
    out: Path | None,
    adapters: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> int:
    """Say whether the artifact OUT fits this machine, and check it quickly on MODEL, the checkpoint it was built from.

    What is written has no paths and no names of the user or the machine, so that it can be attached to a report.

    \b
    Examples:
      h1export doctor falcon-int4 ./Falcon-H1-0.5B --out doctor.json
      h1export doctor falcon --build          # TensorRT: builds the engine for this GPU first
    """
    from h1export.checkpoint import resolve
    from h1export.cli.tables import ProgressBars
    from h1export.commands.doctor import examine, page
    from h1export.writing import write_file

    if out is not None and out.suffix == ".md":
        raise H1ExportError("--out", f"{out} is where the page goes", "name a .json file")
    with ProgressBars(quiet or as_json) as bars:
        document = examine(
            artifact, resolve.resolve(model), build=build, progress=bars, adapters=adapter_folders(adapters)
        )
    if out is not None:
        write_file(out.with_suffix(".md"), page(document).encode())
        write_file(out, (json.dumps(document, indent=1) + "\n").encode())
        say(f"written: {out} and {out.with_suffix('.md').name}", quiet or as_json)
    if as_json:
        answer(document)
    elif not quiet:
        show_text(page(document))
    return 0 if document["fits"] else 1
