"""Build time and peak memory against the size of the model, and how well `h1export plan` predicted them.

    python benchmarks/scale.py --shapes 0.5B 1.5B-Deep 7B 34B --scratch FOLDER --json scale.json --plot scale.png

A checkpoint of more than --real GB has that much in random values; its other shards are sparse files of zeros, which
take no disk and are read, rounded and written like others. Its rate from real values is that of a second row: the same
shape, cut to as many layers as --real GB hold. Every checkpoint is dropped from the page cache before its build, and
deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import ceil, prod
from pathlib import Path

from build import Figures, measure
from make_checkpoint import SHAPES, config, write_checkpoint
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import tensor_shapes

CLI = "from h1export.cli import main; main()"


@dataclass(frozen=True)
class Case:
    """A checkpoint to build: ``layers`` of ``shape``, in ``shards`` of which the first holds values."""

    shape: str
    layers: int
    shards: int = 1


@dataclass(frozen=True)
class Foretold:
    """The prediction of `h1export plan`, and the seconds that it took."""

    artifact_bytes: int
    peak_bytes: int
    seconds: float
    took: float


@dataclass(frozen=True)
class Measured:
    """One build."""

    case: Case
    built: Figures
    plan: Foretold


def source_bytes(shape: str, layers: int) -> int:
    """The bfloat16 checkpoint's weights."""
    return 2 * sum(map(prod, tensor_shapes(FalconH1Config.from_config(config(shape, layers), Path(shape))).values()))


def cases(shape: str, real: float) -> Iterator[Case]:
    """The whole shape, and what ``real`` bytes hold of it where that is less.

    Raises:
        SystemExit: they hold no layer.
    """
    layers = SHAPES[shape][0]
    total = source_bytes(shape, layers)
    if total <= real:
        yield Case(shape, layers)
        return
    fitting = [n for n in range(1, layers) if source_bytes(shape, n) <= real]
    if not fitting:
        sys.exit(f"--real: one layer of {shape} takes {source_bytes(shape, 1) / 1e9:.1f} GB")
    yield Case(shape, fitting[-1])
    yield Case(shape, layers, ceil(total / real))


def forget(folder: Path) -> None:
    """Drop the files of ``folder`` from the page cache, so that the next reader waits for the disk."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def foretell(checkpoint: Path) -> Foretold:
    """Run `h1export plan` in a process of its own, as users do."""
    start = time.perf_counter()
    command = [
        sys.executable,
        "-c",
        CLI,
        "plan",
        str(checkpoint),
        "--target",
        "ort",
        "--quant",
        "int4",
        "--method",
        "rtn",
        "--json",
    ]
    (answer,) = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return Foretold(answer["artifact_bytes"], answer["peak_bytes"], answer["seconds"], time.perf_counter() - start)


def point(case: Case, scratch: Path) -> Measured:
    """Make the checkpoint, plan, build."""
    folder = scratch / f"{case.shape}-{case.layers}"
    try:
        write_checkpoint(folder, config(case.shape, case.layers), case.shards, seed=0, real_shards=1)
        plan = foretell(folder)
        forget(folder)
        return Measured(case, measure(folder, scratch=scratch), plan)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def show(points: list[Measured]) -> None:
    """Print the curves as a table."""
    columns = (
        "shape, layers",
        "source",
        "of values",
        "build",
        "MB/s",
        "peak anonymous",
        "artifact",
        "plan: size",
        "peak",
        "time",
        "took",
    )
    table = Table(
        title="int4, groups of 32, target ort",
        caption=f"{points[0].built.cpu}, {points[0].built.cores} cores",
        box=SIMPLE,
    )
    for column in columns:
        table.add_column(column, justify="right")
    for found in points:
        built = found.built
        plan = found.plan
        table.add_row(
            f"{found.case.shape}, {found.case.layers}",
            f"{built.source_bytes / 1e9:.1f} GB",
            f"{1 / found.case.shards:.0%}",
            f"{built.seconds:.0f} s",
            f"{built.source_mb_per_second:.0f}",
            f"{built.peak_anonymous_bytes / 1e6:.0f} MB",
            f"{built.artifact_bytes / 1e9:.2f} GB",
            f"{plan.artifact_bytes / built.artifact_bytes - 1:+.2%}",
            f"{plan.peak_bytes / built.peak_anonymous_bytes - 1:+.0%}",
            f"{plan.seconds / built.seconds - 1:+.0%}",
            f"{plan.took:.0f} s",
        )
    Console(width=120).print(table)


def plot(points: list[Measured], file: Path) -> None:
    """Seconds and peak memory against the source's size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    seconds, memory = figure.subplots(1, 2)
    for found in points:  # no line between them: layers count too, and some cases are cut
        size = found.built.source_bytes / 1e9
        label = f"{found.case.shape}, {found.case.layers} layers"
        seconds.plot(size, found.built.seconds, "o", label=label)
        memory.plot(size, found.built.peak_anonymous_bytes / 1e6, "o")
    seconds.set(xscale="log", yscale="log", xlabel="checkpoint, GB", ylabel="build, s")
    seconds.legend()
    memory.set(xscale="log", xlabel="checkpoint, GB", ylabel="peak anonymous memory, MB")
    memory.set_ylim(bottom=0)
    figure.savefig(file, dpi=120)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=["0.5B", "1.5B-Deep", "7B", "34B"])
    parser.add_argument(
        "--real", type=float, default=10, help="GB of a checkpoint that hold random values, and not zeros"
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        help="where checkpoints and artifacts are stored (default: the system's temporary folder)",
    )
    parser.add_argument("--json", type=Path, help="write the curves here too, after every build")
    parser.add_argument("--plot", type=Path, help="draw them, e.g. scale.png")
    args = parser.parse_args()
    points: list[Measured] = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for shape in args.shapes:
            for case in cases(shape, 1e9 * args.real):
                points.append(point(case, Path(scratch)))
                show(points[-1:])
                if args.json:
                    args.json.write_text(
                        json.dumps([asdict(found) for found in points], indent=1) + "\n", encoding="utf-8"
                    )
    show(points)
    if args.plot:
        plot(points, args.plot)


if __name__ == "__main__":
    main()
