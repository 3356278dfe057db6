"""Time of a decode step against the length of the context, 1K to 256K tokens.

    python benchmarks/context.py ARTIFACT --threads 2 --json context.json --plot context.png

A long past is not computed: the state buffers are filled with a constant and the session is set to its length, because
time does not depend on values. It does depend on the buffers being real memory, so all of them are written first.
Contexts whose states would not fit into --memory, or that exceed the model's positions, are left out, and said so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from h1export import host
from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.model.falcon_h1.states import StateSpec
from h1export.runtime.runner import Session
from h1export.validate.speed.bench import interleave
from h1export.validate.speed.memory_traffic import read_bandwidth, step_bytes
from h1export.validate.speed.statistics import Estimate, estimate

CONTEXTS = tuple(1024 << power for power in range(9))  # 1K to 256K
STEPS = 8  # decode steps in one timing
FILL = 0.01  # of every state


@dataclass(frozen=True)
class ProbePoint:
    """The seconds of a decode step after one context, and the bytes that it has to read."""

    context: int
    seconds: Estimate
    step_bytes: int
    bandwidth_share: float


@dataclass(frozen=True)
class Curve:
    """A whole run; ``left_out`` has the contexts that do not fit, and ``bandwidth`` is in bytes per second."""

    artifact: str
    kernels: str
    machine: dict[str, Any]
    threads: int
    rounds: int
    bandwidth: Estimate
    points: tuple[ProbePoint, ...]
    left_out: tuple[int, ...]


def decode_seconds(sequences: Session, context: int) -> float:
    """Seconds of a step, over STEPS that end at ``context`` tokens."""
    sequences.length = context - STEPS
    token = np.ones((1, 1), np.int64)
    start = time.perf_counter()
    for _ in range(STEPS):
        sequences.append(token)
    return (time.perf_counter() - start) / STEPS


def measure(artifact: Artifact, contexts: Sequence[int], threads: int, *, rounds: int, memory: int) -> Curve:
    """Decode at every one of ``contexts`` whose states fit into ``memory`` bytes, all in turns on one long sequence."""
    config = artifact.config
    states = StateSpec.of(artifact.config)
    fitting = [n for n in contexts if STEPS < n <= config.max_position_embeddings and states.nbytes(1, n) <= memory]
    if not fitting:
        sys.exit(
            f"no context of {list(contexts)} fits into {decimal(memory)} and {config.max_position_embeddings} positions"
        )
    runner = load_runner(artifact, threads)
    sequences = runner.start(1, max(fitting))
    for state in vars(sequences)["_states"].values():  # no protocol offers a made past, and only this script wants one
        state.fill(FILL)
    jobs = {context: partial(decode_seconds, sequences, context) for context in fitting} | {0: read_bandwidth(threads)}
    interleave(jobs, 1)
    samples = interleave(jobs, rounds)
    bandwidth = estimate(samples.pop(0))
    points = []
    for context, seconds in samples.items():
        size = step_bytes(artifact.manifest, config, 1, depth=context)
        points.append(ProbePoint(context, estimate(seconds), size, size / estimate(seconds).median / bandwidth.median))
    left_out = tuple(n for n in contexts if n not in fitting)
    return Curve(
        artifact.folder.name,
        runner.provenance.kernels,
        host.machine_facts(),
        threads,
        rounds,
        bandwidth,
        tuple(points),
        left_out,
    )


def show(curve: Curve) -> None:
    """Print the curve as a table."""
    table = Table(title=f"{curve.artifact}, {curve.kernels}, threads: {curve.threads}", box=SIMPLE)
    for column in ("context", "ms a token", "interval", "read a step", "of bandwidth"):
        table.add_column(column, justify="right")
    for point in curve.points:
        low, middle, high = (
            f"{1e3 * value:.3g}" for value in (point.seconds.low, point.seconds.median, point.seconds.high)
        )
        table.add_row(
            str(point.context),
            middle,
            f"{low} to {high}",
            decimal(point.step_bytes),
            f"{point.bandwidth_share:.0%}",
        )
    left_out = f"; left out: {', '.join(map(str, curve.left_out))}" if curve.left_out else ""
    bandwidth = f"read bandwidth {curve.bandwidth.median / 1e9:.1f} GB/s"
    table.caption = f"medians of {curve.rounds} interleaved rounds; {bandwidth}{left_out}"
    Console().print(table)


def plot(curve: Curve, file: Path) -> None:
    """Milliseconds against context, beside what the bandwidth alone would allow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    contexts = [point.context for point in curve.points]
    median = [1e3 * point.seconds.median for point in curve.points]
    spans = [
        (1e3 * (p.seconds.median - p.seconds.low), 1e3 * (p.seconds.high - p.seconds.median)) for p in curve.points
    ]
    axes.errorbar(contexts, median, np.transpose(spans), marker="o", label="measured")
    axes.plot(
        contexts,
        [1e3 * point.step_bytes / curve.bandwidth.median for point in curve.points],
        "--",
        label="reading alone",
    )
    axes.set(xscale="log", yscale="log", xlabel="tokens in the context", ylabel="ms per decoded token")
    axes.set_xticks(contexts, [f"{n / 1024:g}K" for n in contexts], minor=False)
    axes.set_title(f"{curve.artifact}, threads: {curve.threads}")
    axes.legend()
    figure.savefig(file, dpi=120)


def free_memory() -> int:
    """Bytes of memory that the kernel reports as available."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--context", type=int, nargs="*", default=CONTEXTS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=float, help="GB that the states may take (default: half of what is free)")
    parser.add_argument("--json", type=Path, help="write the curve here too")
    parser.add_argument("--plot", type=Path, help="draw it, e.g. context.png")
    args = parser.parse_args()
    memory = free_memory() // 2 if args.memory is None else int(args.memory * 1e9)
    curve = measure(Artifact.open(args.artifact), args.context, args.threads, rounds=args.rounds, memory=memory)
    if args.json:
        args.json.write_text(json.dumps(asdict(curve), indent=1) + "\n", encoding="utf-8")
    show(curve)
    if args.plot:
        plot(curve, args.plot)


if __name__ == "__main__":
    main()
