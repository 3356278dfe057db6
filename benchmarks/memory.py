"""The memory that a process holds after loading an artifact, after its first tokens, and at most in a long prompt.

    python benchmarks/memory.py OUT --llama-bench .../llama-bench --gguf model-Q4_0.gguf

Memory is resident memory, mapped files included, and its ratio is to the bytes of the files that a process reads and of
the states. llama-bench shows its largest alone: that of a prompt and that of a few tokens. One process each; what else
the machine does hardly changes these figures.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from build import run_watched
from rich.box import SIMPLE
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from start import bytes_read, theirs

from h1export.artifact.artifact import Artifact
from h1export.artifact.state_bytes import state_bytes

TOKENS = 8


def ours(out: Path, prompt: int, threads: int) -> list[int]:
    """Return what memory_held.py prints."""
    words = [sys.executable, str(Path(__file__).with_name("memory_held.py")), str(out)]
    words += map(str, (prompt, threads, TOKENS))
    return [int(size) for size in subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.split()]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the long prompt")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    artifact = Artifact.open(args.out)
    table = Table("h1export: after", "resident", "of files and states", "at most", box=SIMPLE)
    for prompt in (TOKENS, args.prompt):
        read = bytes_read(artifact) + state_bytes(artifact.manifest, artifact.config, prompt + TOKENS)
        loaded, held, most = ours(args.out, prompt, args.threads)
        if prompt == TOKENS:
            table.add_row("loading", decimal(loaded), f"{loaded / read:.2f}", "")
        table.add_row(f"{prompt} + {TOKENS} tokens", decimal(held), f"{held / read:.2f}", decimal(most))
    Console().print(table)
    if args.llama_bench and args.gguf:
        for prompt in (TOKENS, args.prompt):
            _, most = run_watched(theirs(args.llama_bench, args.gguf, args.threads, prompt=prompt), "VmHWM")
            print(f"llama-bench, a prompt of {prompt}: at most {decimal(most)}")


if __name__ == "__main__":
    main()
