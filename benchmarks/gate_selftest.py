"""Check that the latency gate detects a planted slowdown and passes an unchanged build on a busy machine.

    python benchmarks/gate_selftest.py ARTIFACT [--model CHECKPOINT] [--runs 20] [--planted 5] [--json FILE]

A baseline is measured first. Then, while another process copies memory on the first core all the time, the gate judges
the unchanged artifact RUNS times, which must pass every time, and PLANTED times with every call 1.3 times as long,
which must fail every time. The exit code is 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
from slowed import Slowed

from h1export import host
from h1export.artifact.artifact import Artifact
from h1export.checkpoint.resolve import resolve
from h1export.commands.worker_models import GATE_STEPS, REFERENCE_STEPS, reference_model, timed_runner
from h1export.report.checks import Phase
from h1export.report.report import Verdict
from h1export.targets import get_target
from h1export.validate.speed.gate_checks import Check, check_label
from h1export.validate.speed.gate_file import Baseline, Gate, Limit
from h1export.validate.speed.regression import (
    GateReport,
    Makers,
    ModelPair,
    counted,
    measured,
    measured_checks,
)
from h1export.validate.speed.worker import RunnerModel, Timing

TIMINGS = (Limit(Timing(Phase.DECODE, 0)), Limit(Timing(Phase.PREFILL, 128)))
FACTOR = 1.3
LOAD_BYTES = 1 << 26  # copied by the load: beyond caches, so that it takes memory bandwidth too


def play(folder: Path, checkpoint: Path, factor: float) -> ModelPair:
    """The models that a gate's worker process times, with calls of the artifact ``factor`` times as long."""
    host.pin(1)
    runner = timed_runner(Artifact.open(folder), 1, "auto")
    slowed = RunnerModel(Slowed(runner, factor), GATE_STEPS, time.process_time)
    return ModelPair(slowed, reference_model(checkpoint, runner, 1, steps=REFERENCE_STEPS, clock=time.process_time))


def makers(folder: Path, checkpoint: Path, factor: float) -> Makers:
    pair = partial(play, folder, checkpoint, factor)
    return Makers(pair, pair, GATE_STEPS)


def load_core(core: int) -> None:
    """Keep one core and the memory busy until the process is killed."""
    os.sched_setaffinity(0, {core})
    source = np.ones(LOAD_BYTES, np.uint8)
    while True:
        source.copy()


@contextmanager
def loaded() -> Iterator[None]:
    """Keep the first core busy; the gate's process runs on the last one."""
    process = multiprocessing.get_context("spawn").Process(
        target=load_core, args=(min(os.sched_getaffinity(0)),), daemon=True
    )
    process.start()
    try:
        yield
    finally:
        process.kill()


def runs(
    folder: Path, checkpoint: Path, baseline: Baseline, *, gate: Gate, factor: float, count: int
) -> Iterator[tuple[Check, ...]]:
    """The checks of ``count`` gates, one after the other."""
    for number in range(1, count + 1):
        start = time.perf_counter()
        checks = tuple(measured_checks(makers(folder, checkpoint, factor), baseline, gate))
        said = ", ".join(
            f"{check_label(check)} {check.figure:.3f} {check.verdict} after {check.note}" for check in checks
        )
        print(f"x{factor} {number}/{count}: {said}; {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        yield checks


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--model", help="the checkpoint it was built from [default: h1export's own]")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--planted", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write every check here too")
    args = parser.parse_args()
    artifact = Artifact.open(args.artifact)
    checkpoint = resolve(args.model)
    target = artifact.manifest.target
    gate = Gate(target, artifact.manifest.scheme["quant"], TIMINGS)
    now = counted(artifact, gate, get_target(target).operations(artifact))
    baseline = replace(
        measured(makers(args.artifact, checkpoint, 1.0), now, gate), peak_bytes=0
    )  # memory is not in question here
    with loaded():
        unchanged = list(runs(args.artifact, checkpoint, baseline, gate=gate, factor=1.0, count=args.runs))
        planted = list(runs(args.artifact, checkpoint, baseline, gate=gate, factor=FACTOR, count=args.planted))
    found = {"unchanged": (unchanged, Verdict.PASS), f"slowed {FACTOR} times": (planted, Verdict.FAIL)}
    facts = host.machine_facts()
    print(f"{facts['cpu']}, {facts['cores']} cores, {host.cpu_kind()}")
    for name, (checked, _) in found.items():
        print(
            name, dict(Counter(str(check.verdict) for checks in checked for check in checks)), f"in {len(checked)} runs"
        )
    if args.json:
        args.json.write_text(
            json.dumps({name: [[asdict(c) for c in cs] for cs in checked] for name, (checked, _) in found.items()})
        )
    reports = [
        (GateReport(str(args.artifact), gate, {}, checks=checks), wanted)
        for checked, wanted in found.values()
        for checks in checked
    ]
    sys.exit(not all(report.verdict is wanted for report, wanted in reports))


if __name__ == "__main__":
    main()
