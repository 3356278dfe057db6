"""Serving under load, beside llama.cpp's server: the same prompts, the same clients, by turns.

    python benchmarks/serve.py OUT --llama-server .../llama-server --gguf model-Q4_0.gguf --threads 2 --json serve.json

Both servers run all the time, and one of them is asked at a time. Every round has new prompts, so what is reused comes
from the same round. Ratios are h1export's to llama.cpp's, the median of the rounds. Needs the extra `serve` and the
package openai. Without --llama-server, h1export alone is measured.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import httpx2
from build import cpu_model, status_bytes
from rich.box import SIMPLE
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from serve_load import PREFIX, Figures, Load, requests, run

from h1export.artifact.artifact import Artifact

START_LIMIT = 120  # seconds until a server answers
ROOM = PREFIX + 640  # tokens of a sequence at most, for llama.cpp's cache
PER_CLIENT = 2  # requests of each client in a round, and 8 at least in all


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    name: str
    url: str
    model: str
    pid: int


@dataclass(frozen=True)
class Row:
    """A load on a server: the figures of each round, and its memory after them in bytes."""

    server: str
    load: Load
    clients: int
    rounds: tuple[Figures, ...]
    memory: int


@contextmanager
def started(name: str, command: Sequence[str], model: str, *, port: int, log: Path) -> Iterator[Server]:
    """Run a server until it answers, and stop it in the end."""
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            end = time.monotonic() + START_LIMIT
            while True:
                with suppress(httpx2.TransportError):
                    if httpx2.get(f"{url}/health").status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{name} does not answer; see {log}")
                time.sleep(0.2)
            yield Server(name, url, model, process.pid)
        finally:
            process.terminate()


def free_port() -> int:
    """Return a port that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def servers(args: argparse.Namespace, stack: ExitStack) -> list[Server]:
    """Start h1export, and llama.cpp where it is given, each with room for the most clients."""
    rows, threads, port = str(max(args.clients)), str(args.threads), free_port()
    ours = [str(Path(sys.executable).with_name("h1export")), "serve", f"model={args.out}", "--port", str(port)]
    ours += ["--threads", threads, "--rows", rows, "--queue", "1000"]
    found = [stack.enter_context(started("h1export", ours, "model", port=port, log=args.logs / "h1export.log"))]
    if args.llama_server:
        port = free_port()
        theirs = [str(args.llama_server), "-m", str(args.gguf), "--port", str(port), "-t", threads, "-tb", threads]
        theirs += ["-np", rows, "-c", str(max(args.clients) * ROOM), "--no-webui", "-fa", "on"]
        name = f"llama.cpp {args.gguf.name}"
        found.append(stack.enter_context(started(name, theirs, name, port=port, log=args.logs / "llama.log")))
    return found


def measure(found: Sequence[Server], args: argparse.Namespace, vocabulary: int) -> list[Row]:
    """Return a row of every load, number of clients and server."""
    for server in found:  # kernels, pages and caches
        run(server.url, server.model, requests(Load.SHORT, 2, vocabulary, seed=0), clients=2)
    rows = []
    for load in args.loads:
        for clients in args.clients:
            rounds: dict[str, list[Figures]] = {server.name: [] for server in found}
            for number in range(args.rounds):
                wanted = requests(load, max(8, PER_CLIENT * clients), vocabulary, seed=1 + number)
                for server in found if number % 2 == 0 else reversed(found):
                    if load is Load.SHARED:  # the prefix is known, as a system's prompt is
                        run(server.url, server.model, wanted[:1], clients=1)
                    rounds[server.name].append(run(server.url, server.model, wanted, clients=clients))
            for server in found:
                memory = status_bytes(server.pid, "VmRSS")
                rows.append(Row(server.name, load, clients, tuple(rounds[server.name]), memory))
                print(rows[-1].server, load, clients, rows[-1].rounds[-1], flush=True)
    return rows


def show(rows: Sequence[Row]) -> None:
    """Print a line for every load and number of clients; times are median / 99th percentile in milliseconds."""
    table = Table(
        "load", "clients", "server", "tokens/s", "ratio", "first token", "between tokens", "memory", box=SIMPLE
    )
    ours = {(row.load, row.clients): row for row in rows if row.server == "h1export"}
    for row in rows:
        own = ours[row.load, row.clients]
        pairs = zip(own.rounds, row.rounds, strict=True)
        ratio = median(one.tokens_per_second / other.tokens_per_second for one, other in pairs)
        table.add_row(
            row.load,
            str(row.clients),
            row.server,
            f"{median(one.tokens_per_second for one in row.rounds):.1f}",
            "" if row is own else f"{ratio:.2f}",
            _times([one.first for one in row.rounds]),
            _times([one.gap for one in row.rounds]),
            decimal(row.memory),
        )
    Console(width=140).print(table)


def _times(pairs: Sequence[tuple[float, float]]) -> str:
    return " / ".join(f"{1000 * median(pair[part] for pair in pairs):.0f}" for part in (0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="an artifact with a tokenizer")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server")
    parser.add_argument("--gguf", type=Path, help="the model for it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--loads", type=Load, nargs="+", default=list(Load), choices=list(Load))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--logs", type=Path, default=Path(), help="where the servers' own output goes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if bool(args.llama_server) != bool(args.gguf):
        parser.error("--llama-server and --gguf go together")
    vocabulary = Artifact.open(args.out).config.vocab_size
    with ExitStack() as stack:
        rows = measure(servers(args, stack), args, vocabulary)
    show(rows)
    if args.json:
        found = {"cpu": cpu_model(), "threads": args.threads, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
