"""From the start of a process to its first token, and the memory that it then holds, beside llama.cpp.

    python benchmarks/start.py OUT --llama-bench .../llama-bench --gguf model-Q4_0.gguf

Each round starts `h1export generate` for one token after a prompt of a few tokens, and llama-bench for a prompt of as
many without a warm-up, by turns. Times are of whole processes with a warm page cache. Memory is the largest resident
one, mapped files included, and is compared with the bytes of the files that a process reads and of the states. Medians
count.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median

from build import run_watched
from rich.box import SIMPLE
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from h1export.artifact.artifact import Artifact
from h1export.artifact.state_bytes import state_bytes

PROMPT = "import os, sys"
TOKENS = 8  # of llama-bench's prompt
UNUSED = ("model.onnx", "README.md", "sbom.json")  # what generation does not read


def ours(out: Path, threads: int) -> list[str]:
    """The command that writes one token."""
    program = str(Path(sys.executable).with_name("h1export"))
    return [program, "generate", str(out), PROMPT, "--max-tokens", "1", "--threads", str(threads)]


def theirs(program: Path, gguf: Path, threads: int, *, prompt: int = TOKENS) -> list[str]:
    """The command that computes a prompt, whose last logits are those of the first token."""
    numbers = ("-p", str(prompt), "-n", "0", "-r", "1", "-t", str(threads))
    return [str(program), "-m", str(gguf), *numbers, "--no-warmup"]


def bytes_read(artifact: Artifact) -> int:
    """Return the bytes of the files that generation reads."""
    return sum(size for name, (_, size) in artifact.manifest.files.items() if name not in UNUSED)


def watched(command: list[str]) -> tuple[float, int]:
    """Returns the seconds of a process, and its largest resident memory in bytes."""
    with Path("/dev/null").open("w") as nowhere:
        return run_watched(command, "VmHWM", stdout=nowhere)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    artifact = Artifact.open(args.out)
    commands = {"h1export": ours(args.out, args.threads)}
    sizes = {"h1export": bytes_read(artifact) + state_bytes(artifact.manifest, artifact.config, TOKENS)}
    if args.llama_bench and args.gguf:
        commands["llama.cpp"] = theirs(args.llama_bench, args.gguf, args.threads)
        sizes["llama.cpp"] = args.gguf.stat().st_size + state_bytes(artifact.manifest, artifact.config, TOKENS)
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    for command in commands.values():  # the page cache
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for number in range(args.rounds):
        for name in list(commands)[:: -1 if number % 2 else 1]:
            found[name].append(watched(commands[name]))
    table = Table("process", "first token, s", "resident", "of files and states", box=SIMPLE)
    for name, runs in found.items():
        memory = median(size for _, size in runs)
        seconds = median(one for one, _ in runs)
        table.add_row(name, f"{seconds:.2f}", decimal(int(memory)), f"{memory / sizes[name]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
