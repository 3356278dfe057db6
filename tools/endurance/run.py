"""Everything of this folder, one line a row of the table that it prints; ``nox -s endurance`` runs it.

    python -m endurance.run FOLDER [--cycles 1000] [--tokens 20000] [--only large|long|cycles ...]

FOLDER gets checkpoints and artifacts: 9 GB, for a file system whose files can have holes. Each row is a process of its
own, so that its memory is. Exit code 1: a fault.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from endurance import long, sparse_model

TOOLS = Path(__file__).parents[1]
SLOWER = 20  # times fewer cycles where a load takes seconds: of TensorRT's network and CoreML's program on a CPU
LINES = 4  # of an error, at most


def command(*words: object) -> tuple[bool, str]:
    """Run a module of this folder."""
    return ran([sys.executable, "-W", "ignore", "-m", *map(str, words)])


def ran(words: list[str]) -> tuple[bool, str]:
    """Run a command; return whether it ended well, and what it printed last."""
    done = subprocess.run(words, cwd=TOOLS, capture_output=True)
    text = (done.stdout if done.returncode in (0, 1) and done.stdout else done.stderr).decode(errors="replace")
    return done.returncode == 0, "; ".join(text.strip().splitlines()[-LINES:])


def h1export(*words: object) -> tuple[bool, str]:
    """Run the command line."""
    return ran([sys.executable, "-c", "from h1export.cli import main; main()", *map(str, words)])


def build(out: Path, target: str, *options: object) -> Path:
    """Build an artifact of integers by rounding; raises where that fails."""
    if not out.exists():
        right, text = h1export("build", *options, "--target", target, "--method", "rtn", "--out", out)
        if not right:
            raise RuntimeError(text)
    return out


def large(folder: Path) -> Iterator[tuple[str, Callable[[], tuple[bool, str]]]]:
    """Weights beyond 2^31 elements: the whole build, and both kernels."""
    checkpoints = folder / "sparse", folder / "small"
    if not checkpoints[0].exists():
        sparse_model.write(*checkpoints)
    for quant in ("int4", "int8"):
        outs = [folder / f"{checkpoint.name}-{quant}" for checkpoint in checkpoints]

        def built(quant: str = quant, outs: list[Path] = outs) -> tuple[bool, str]:
            for checkpoint, out in zip(checkpoints, outs, strict=True):
                build(out, "ort", checkpoint, "--quant", quant)
            size = sum(path.stat().st_size for path in outs[0].iterdir())
            return True, f"{size / 1e9:.2f} GB written"

        def inspected(out: Path = outs[0]) -> tuple[bool, str]:
            right, text = h1export("inspect", out, "--json")
            return right, "reads" if right else text

        yield f"{sparse_model.VOCABULARY} x {sparse_model.HIDDEN}, {quant}: build", built
        yield f"{quant}: inspect", inspected
        for kernels in ("native", "stock"):
            yield (
                f"{quant}, {kernels} kernels",
                lambda kernels=kernels, outs=outs: command("endurance.compare_large", *outs, kernels, checkpoints[1]),
            )
        yield f"{quant}: removed", lambda outs=outs: (shutil.rmtree(outs[0]), (True, ""))[1]


def texts(folder: Path, tokens: int) -> Iterator[tuple[str, Callable[[], tuple[bool, str]]]]:
    """Many tokens, in float32 arithmetic."""
    checkpoint = folder / "long"
    if not checkpoint.exists():
        long.long_context(checkpoint, tokens + 2 * len(long.PROMPT))
    out = build(folder / "long-ort", "ort", checkpoint, "--quant", "int4", "--accuracy-level", 0)
    for how, name in (("session", "h1export generate's loop"), ("hf", "hf.load(...).generate")):
        yield name, lambda how=how: command("endurance.long", out, how, tokens)


def cycles(folder: Path, count: int) -> Iterator[tuple[str, Callable[[], tuple[bool, str]]]]:
    """Loads, and processes of chat templates."""
    ort, trt, coreml = (build(folder / target, target, "--quant", "int4") for target in ("ort", "trt", "coreml"))
    fewer = max(8, count // SLOWER)
    for name, words in {
        "ONNX Runtime, native kernels": ("load", ort, count, "native"),
        "ONNX Runtime, its own kernels": ("load", ort, count, "stock"),
        "TensorRT, the network on the CPU": ("load", trt, fewer, "stock"),
        "CoreML, our evaluator": ("load", coreml, fewer),
        "chat template's process": ("template", ort, count),
    }.items():
        yield name, lambda words=words: command("endurance.cycles", *words)


def main() -> int:
    """Run every row, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--only", nargs="*", choices=("large", "long", "cycles"), default=("large", "long", "cycles"))
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[], Iterator[tuple[str, Callable[[], tuple[bool, str]]]]]] = {
        "large": lambda: large(folder),
        "long": lambda: texts(folder, given.tokens),
        "cycles": lambda: cycles(folder, given.cycles),
    }
    wrong = []
    for part in given.only:
        for name, row in parts[part]():
            start = time.monotonic()
            right, text = row()
            wrong += [] if right else [name]
            print(
                f"| {name} | {text} | {'right' if right else 'WRONG'} | {time.monotonic() - start:.0f} s |", flush=True
            )
    print(json.dumps({"wrong": wrong}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
