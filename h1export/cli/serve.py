"""`h1export serve`."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import click
import cloup

from h1export.cli.common import answer, common, kernels_option, say, verify_option
from h1export.cli.ranges import THREADS, count
from h1export.errors import H1ExportError
from h1export.targets import Kernels

NEEDED = ("starlette", "uvicorn", "prometheus_client", "llguidance")


@cloup.command(short_help="Serve artifacts over HTTP, as OpenAI's API.")
@click.argument("outs", metavar="OUT...", nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address; 0.0.0.0: all of this machine's.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option("--keys", type=click.Path(path_type=Path), metavar="FILE", help="API keys, one a line [default: none].")
@click.option("--rows", default=8, show_default=True, type=count(1), help="Texts computed at once, of each OUT.")
@click.option("--queue", default=64, show_default=True, type=count(), help="Prompts that wait, of each OUT.")
@click.option(
    "--prefix-memory", default=512, show_default=True, type=count(), help="MiB of kept states, of each OUT; 0: none."
)
@click.option("--drain", default=30, show_default=True, type=count(), help="Seconds for answers after SIGTERM.")
@click.option("--threads", default=0, show_default=True, type=THREADS, help="0: the runtime's choice.")
@kernels_option
@verify_option
@common
def serve(
    outs: tuple[str, ...],
    host: str,
    port: int,
    keys: Path | None,
    rows: int,
    queue: int,
    prefix_memory: int,
    drain: int,
    threads: int,
    kernels: Kernels,
    verify: Path | None,
    quiet: bool,
    as_json: bool,
) -> int:
    """Serve the artifacts OUT... over HTTP: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics.

    OUT is a folder, which gives the model its name, or NAME=FOLDER. SIGTERM and Ctrl-C let answers finish. With --json,
    the address is printed as JSON when the server listens.

    \b
    Examples:
      h1export serve falcon-int4
      h1export serve small=falcon-0.5b large=falcon-3b --port 9000 --keys keys.txt
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise H1ExportError(missing[0], "is not installed", "pip install 'h1export[serve]'")
    from h1export.serve.model import Room
    from h1export.serve.server import Place, Server, named

    server = Server(
        named(outs),
        Place(host, port, drain),
        Room(rows, queue, prefix_memory << 20),
        keys=keys,
        threads=threads,
        kernels=kernels,
        verify=verify,
        report=partial(say, quiet=quiet),
    )
    say(f"serving {', '.join(server.models)} at {server.url}", quiet)
    if as_json:
        answer({"url": server.url, "models": list(server.models)})
    server.run()
    return 0
