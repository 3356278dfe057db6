"""Time the scan, the decode update and the convolution beside their peers, as shares of the measured roofline.

    PYTHONPATH=.:tools python -m benchmarks.gpu.kernels [--full] [--budget 60] [--json FILE] [--profile FOLDER]

Every contender's result is compared with a float64 recurrence first; one that is wrong or does not run gets a row with
the reason and no time. The share of the roofline is the time that the bytes and operations of tools/roofline.py take at
the ceilings measured on this device, over the time measured; one bound serves every contender. Ours is timed alone in
every case first, and then in turns with the peers, whose autotuning is bounded. Without --full, the 0.5B and 7B shapes
run at batch 1, 8 and 64, and what the budget leaves out gets a row that says so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu import ceilings, clock, contenders, profiling, results, tuning
from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.contenders import Contender, Inputs, Makers, Result
from benchmarks.gpu.tuning import Tuned
from gpu_host.section import Row
from roofline import PUBLISHED, Gpu, Shape, Work, conv_work, scan_work

OURS, BESIDE = "h1export", " beside peers"
BATCHES = (1, 8, 64)
TOKENS = (1, 512, 4096, 16384)
SUBSET = ("0.5B", "7B")
DRY = Shape("dry", 2, 32, d_state=64, groups=1)
DRY_TOKENS = (1, 40)
CHECKED = (2, 600)  # the largest batch and tokens of the comparison with float64, which goes token by token
PART_TOKENS = 4096  # of the prompts whose kernels are timed one by one
MEMORY_SHARE = 0.3  # of the device's memory that one case's inputs, outputs and workspace may take
PREFILL_SHARE, PREFILL_GAIN, DECODE_SHARE, DECODE_BATCH = 0.6, 1.3, 0.8, 64  # what is required of ours


@dataclass(frozen=True)
class Case:
    """One op at one shape, batch and number of tokens."""

    op: str
    shape: Shape
    batch: int
    tokens: int

    @property
    def name(self) -> str:
        """Return the name of its rows."""
        phase = "decode" if self.tokens == 1 else "prefill"
        return f"{self.op} {phase} {self.shape.model} batch {self.batch} tokens {self.tokens}"

    def inputs(self, device: str, seed: int = 0) -> Inputs:
        """Return random inputs."""
        make = contenders.conv_inputs if self.op == "causal_conv" else contenders.scan_inputs
        return make(self.shape, self.batch, self.tokens, device=device, seed=seed)

    def reference(self, inputs: Inputs) -> Result:
        """Return the float64 result."""
        return (contenders.conv_reference if self.op == "causal_conv" else contenders.scan_reference)(inputs)

    def works(self) -> list[Work]:
        """Return the counted bytes and operations of each launch of our kernels."""
        if self.op == "causal_conv":
            return [conv_work(self.batch, self.tokens, self.shape.channels, taps=self.shape.taps)]
        return list(scan_work(self.shape.problem(self.batch, self.tokens)).values())

    def bound_seconds(self, gpu: Gpu) -> float:
        """Return the time that the counted work takes at the ceilings of ``gpu``."""
        return sum(work.seconds(gpu) for work in self.works())


def cases(dry: bool, *, full: bool) -> list[Case]:
    """Return the cases in the order in which they run: what the requirements are about comes first."""
    shapes = [DRY] if dry else [s for s in PUBLISHED if full or s.model in SUBSET]
    tokens = DRY_TOKENS if dry else TOKENS
    batches = BATCHES if not dry else (2,)
    scans = [Case("ssm_scan", s, b, t) for s, b, t in product(shapes, batches, tokens)]
    convs = [Case("causal_conv", s, b, t) for s, b, t in product(shapes, batches, tokens)]
    return sorted(scans + convs, key=lambda case: (case.op != "ssm_scan", case.tokens > TOKENS[2], case.batch == 8))


def too_large(case: Case, device: str) -> str:
    """Return why a case does not fit the memory, or an empty text."""
    if device == "cpu":
        return ""
    needed = 2 * sum(work.bytes for work in case.works())
    limit = int(MEMORY_SHARE * torch.cuda.get_device_properties(0).total_memory)
    return f"left out: about {needed >> 20} MiB of {limit >> 20} MiB" if needed > limit else ""


def checked(case: Case, makers: Makers, device: str, *, name: str) -> tuple[dict[str, Contender], list[Row]]:
    """Return the contenders that are right, and a row, whose name begins with ``name``, for each other one."""
    small = replace(case, batch=min(case.batch, CHECKED[0]), tokens=min(case.tokens, CHECKED[1]))
    inputs = small.inputs(device)
    expected = small.reference(inputs)
    right: dict[str, Contender] = {}
    rows: list[Row] = []
    for each, make in makers.items():
        required = False if each == OURS else None
        try:
            contender = make()
            ready = contender.prepare(inputs)
            result = contender.finish(contender.call(ready), ready, inputs)
        except (Exception, SystemExit) as why:  # a peer may raise anything when it is imported or compiled
            detail = f"does not run: {type(why).__name__}: {first_line(why)}"
            rows.append(Row(f"{name}: {each}", required, detail=detail))
            continue
        found = contenders.error(result, expected)
        if found <= contenders.SCAN_TOLERANCE:
            right[each] = contender
        else:
            detail = "wrong against the float64 reference, so not timed"
            rows.append(Row(f"{name}: {each}", required, {"relative_error": found}, detail))
    return right, rows


def first_line(error: BaseException) -> str:
    """Return the first line of an error, short enough for a row."""
    return (str(error).splitlines() or [""])[0][:200]


def bound_call(contender: Contender, inputs: Inputs) -> Callable[[], Any]:
    """Return the call of a contender on inputs that are prepared now."""
    ready = contender.prepare(inputs)
    return lambda: contender.call(ready)


def case_rows(
    case: Case, gpu: Gpu, device: str, *, makers: Makers | None = None, beside: str = "", tuned: Tuned | None = None
) -> Iterator[Row]:
    """Yield a row for every contender of a case.

    Args:
        case: what is timed.
        gpu: the ceilings.
        device: "cuda", or "cpu" for a dry run.
        makers: the contenders; None for all.
        beside: what follows the case's name in the names of the rows.
        tuned: what a limit left out of the peers' autotuning.
    """
    name = f"{case.name}{beside}"
    if reason := too_large(case, device):
        yield Row(name, detail=reason)
        return
    available = makers if makers is not None else contenders.makers(case.op, case.tokens == 1)
    right, failed = checked(case, available, device, name=name)
    yield from failed
    if not right:
        return
    sets = clock.input_sets(sum(work.bytes for work in case.works()), device)
    inputs = [case.inputs(device, seed) for seed in range(sets)]
    calls = {name: [bound_call(contender, each) for each in inputs] for name, contender in right.items()}
    times = clock.interleaved(calls, device, rounds=3 if device == "cpu" else 15)
    bound = case.bound_seconds(gpu)
    best_peer = min((timing.median for peer, timing in times.items() if peer != OURS), default=None)
    for contender, timing in times.items():
        share = bound / timing.median
        figures = timing.figures() | {
            "roofline_share": share,
            "bound_us": bound * 1e6,
            "counted_bytes": sum(work.bytes for work in case.works()),
            "counted_operations": sum(work.operations for work in case.works()),
        }
        passed = None
        detail = "" if contender == OURS or tuned is None else tuned.note
        if contender == OURS:
            gain = best_peer / timing.median if best_peer is not None else None
            figures["times_faster_than_best_peer"] = gain
            passed = met(case, share, gain) if device != "cpu" else None
        yield Row(f"{name}: {contender}", passed, figures, "dry run: no figure" if device == "cpu" else detail)


def met(case: Case, share: float, gain: float | None) -> bool | None:
    """Return whether ours meets what is required of this case; None where nothing is."""
    if case.op != "ssm_scan":
        return None
    if case.tokens > 1:
        return share >= PREFILL_SHARE or (gain is not None and gain >= PREFILL_GAIN)
    return share >= DECODE_SHARE if case.batch == DECODE_BATCH else None


@dataclass
class Bench:
    """The cases, timed in two passes: ours first, so that what is required has figures, then beside the peers.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        gpu: the measured ceilings.
        full: all published shapes instead of two.
        profile: the folder for the profiles of what falls short; None for none.
        undecided: rows of ours below the share that is required, which a gain over the peers may still replace.
    """

    device: str
    gpu: Gpu
    full: bool = False
    profile: Path | None = None
    undecided: dict[Case, Row] = field(default_factory=dict)

    def cases(self) -> list[Case]:
        """Return the cases in their order."""
        return cases(self.device == "cpu", full=self.full)

    def own(self, *, end: float) -> Iterator[Row]:
        """Yield a row for each case that begins before time.monotonic() ``end``, of ours alone."""
        for case in self.cases():
            for row in self._timed(case, end=end, tuned=None, beside=""):
                if row.passed is False and case.tokens > 1 and "median_us" in row.figures:
                    self.undecided[case] = row
                    yield replace(row, passed=None, detail=f"below {PREFILL_SHARE}: judged beside its peers")
                else:
                    yield row

    def parts(self, *, end: float) -> Iterator[Row]:
        """Yield a row for each scan of PART_TOKENS tokens at batch 1, with the time of each of our kernels alone."""
        tokens = max(DRY_TOKENS) if self.device == "cpu" else PART_TOKENS
        for case in self.cases():
            if case.op == "ssm_scan" and case.tokens == tokens and case.batch in {1, 2} and time.monotonic() < end:
                calls = contenders.own_kernels(case.inputs(self.device), self.device)
                rounds = 3 if self.device == "cpu" else 15
                times = clock.interleaved({name: [call] for name, call in calls.items()}, self.device, rounds=rounds)
                figures = {f"{name}_us": timing.median * 1e6 for name, timing in times.items()}
                works = scan_work(case.shape.problem(case.batch, case.tokens))
                figures |= {f"{name}_bound_us": work.seconds(self.gpu) * 1e6 for name, work in works.items()}
                detail = "dry run: no figure" if self.device == "cpu" else ""
                yield Row(f"{case.name}: each kernel of h1export", None, figures, detail)

    def peers(self, *, end: float) -> Iterator[Row]:
        """Yield the rows of each case beside its peers, and of each that was not timed so and falls short."""
        for case in self.cases():
            with tuning.limited(end=end) as tuned:
                for row in self._timed(case, end=end, tuned=tuned, beside=BESIDE):
                    if row.name.endswith(f": {OURS}"):
                        self.undecided.pop(case, None)
                    yield row
        for case, row in self.undecided.items():
            yield replace(row, name=f"{case.name}{BESIDE}: {OURS}", detail=f"below {PREFILL_SHARE}; no peer was timed")

    def _timed(self, case: Case, *, end: float, tuned: Tuned | None, beside: str) -> Iterator[Row]:
        """Yield the rows of a case, of all contenders where ``tuned`` tells of the peers, else of ours alone."""
        if time.monotonic() > end:
            yield Row(f"{case.name}{beside}", detail="left out: the time was over")
            return
        ours: Makers | None = {OURS: partial(contenders.own, case.op)} if tuned is None else None
        try:
            for row in case_rows(case, self.gpu, self.device, makers=ours, beside=beside, tuned=tuned):
                yield row
                if self.profile is not None and row.passed is False and "median_us" in row.figures:
                    call = bound_call(contenders.own(case.op), case.inputs(self.device))
                    profiling.write(self.profile, case.name, call, device=self.device)
        except torch.OutOfMemoryError as why:
            yield Row(f"{case.name}{beside}", detail=f"left out: {first_line(why)}")
        if self.device != "cpu":
            torch.cuda.empty_cache()


def ceilings_row(measured: Ceilings, device: str) -> Row:
    """Return the row of the ceilings."""
    detail = "dry run: no figure" if device == "cpu" else ""
    return Row(f"ceilings of {measured.gpu.name}", figures=measured.figures(), detail=detail)


def run(device: str, *, full: bool = False, budget: float = 60.0, profile: Path | None = None) -> Iterator[Row]:
    """Yield the ceilings, then the rows of every case until ``budget`` seconds are over, ours alone first.

    Args:
        device: "cuda", or "cpu" for a dry run.
        full: all published shapes instead of two.
        budget: seconds after which no further case begins.
        profile: the folder for the profiles of what falls short; None for none.
    """
    end = time.monotonic() + budget
    measured = ceilings.measure(device)
    yield ceilings_row(measured, device)
    bench = Bench(device, measured.gpu, full, profile)
    yield from bench.own(end=end)
    yield from bench.parts(end=end)
    yield from bench.peers(end=end)


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all published shapes")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds after which no further case begins")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--profile", type=Path, help="folder for profiles of the rows that fall short")
    args = parser.parse_args()
    device = results.device()
    rows = run(device, full=args.full, budget=args.budget, profile=args.profile)
    results.report(rows, device, path=args.json)


if __name__ == "__main__":
    main()
