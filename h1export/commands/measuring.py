"""Benchmark and gate: artifacts and their reference, each in a worker process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from h1export import host
from h1export.artifact.artifact import Artifact
from h1export.commands.pipeline import check_source, load
from h1export.errors import H1ExportError
from h1export.progress import SILENT, Progress
from h1export.report.report import Verdict
from h1export.runtime.runner import Inspectable
from h1export.targets import Kernels, get_target
from h1export.validate.accuracy.reference import Reference
from h1export.validate.speed.bench import BenchOptions, BenchReport, Candidate, of_artifact
from h1export.validate.speed.bench import bench as run_bench
from h1export.validate.speed.gate_checks import Check, GateCheckKind
from h1export.validate.speed.gate_file import Baseline, Clock, Gate, read_baselines, read_gates, write_baselines
from h1export.validate.speed.memory_traffic import float_bytes, float_step_bytes
from h1export.validate.speed.regression import (
    WRITE,
    GateReport,
    Makers,
    ModelPair,
    counted,
    counted_checks,
    measured,
    measured_checks,
)
from h1export.validate.speed.worker import RunnerModel, pin

GATE_STEPS = 16  # tokens that a timing of a gate decodes
REFERENCE_STEPS = 4  # the same of the reference, which is slower
CLOCKS: Mapping[Clock, Callable[[], float]] = {Clock.CPU: time.process_time, Clock.WALL: time.perf_counter}


def bench(
    out: Path,
    against: Path | None,
    checkpoint: Path | None,
    options: BenchOptions,
    progress: Progress = SILENT,
    kernels: Kernels = "auto",
) -> BenchReport:
    """Measure the speed of the artifact ``out``, in turns with another or with the reference on its ``checkpoint``.

    Raises:
        H1ExportError: a damaged artifact, one that does not run here, or a checkpoint that it was not built from.
    """
    artifacts = [Artifact.open(folder) for folder in (out, against) if folder is not None]
    candidates = [
        of_artifact(artifact, partial(_artifact_maker, artifact.folder, kernels, options.steps))
        for artifact in artifacts
    ]
    if checkpoint is not None:
        candidates.append(_reference(artifacts[0], checkpoint, kernels, steps=options.steps))
    return run_bench(candidates, options, progress)


def _reference(artifact: Artifact, checkpoint: Path, kernels: Kernels, steps: int) -> Candidate:
    """Return the candidate that is transformers' model in float32, on the weights that ``artifact`` stores."""
    check_source(artifact, checkpoint)
    config = artifact.config
    held = "the artifact's, dequantised" if artifact.manifest.weights else "the checkpoint's"

    def make(threads: int) -> Callable[[], RunnerModel]:
        return partial(_reference_model_of, checkpoint, artifact.folder, threads, kernels=kernels, steps=steps)

    return Candidate(
        str(checkpoint),
        "transformers",
        {"weights": held},
        weight_bytes=float_bytes(config),
        step_bytes=partial(float_step_bytes, config),
        make=make,
    )


@dataclass(frozen=True)
class Gated:
    """An artifact, its gate, its figures now, and the baselines of all gates in the file ``place``."""

    artifact: Artifact
    gate: Gate
    now: Baseline
    place: Path
    baselines: Mapping[str, Baseline]

    @classmethod
    def open(cls, out: Path, gates: Path, checkpoint: Path) -> Gated:
        """Open ``out`` and find its gate.

        Raises:
            H1ExportError: a damaged artifact, none of ``gates`` is for it, or ``checkpoint`` is not its source.
        """
        artifact = Artifact.open(out)
        manifest = artifact.manifest
        found, place = read_gates(gates)
        mine = [gate for gate in found if (gate.target, gate.quant) == (manifest.target, manifest.scheme["quant"])]
        if not mine:
            raise H1ExportError(
                gates, f"has no gate for target {manifest.target}, quant {manifest.scheme['quant']}", "add one"
            )
        if mine[0].timings:
            check_source(artifact, checkpoint)
        now = counted(artifact, mine[0], get_target(manifest.target).operations(artifact))
        return cls(artifact, mine[0], now, place=place, baselines=read_baselines(place))

    @property
    def name(self) -> str:
        return f"{self.gate.target} {self.gate.quant}"

    def makers(self, checkpoint: Path, kernels: Kernels) -> Makers | None:
        """None where no runtime of this machine runs the artifact.

        Raises:
            H1ExportError: it runs on a GPU, whose time the gate's clock does not count.
        """
        gate = self.gate
        folder = self.artifact.folder
        provenance = load(self.artifact, gate.threads, kernels=kernels).provenance
        if provenance.emulated:
            return None
        if provenance.gpu and gate.clock is Clock.CPU and gate.timings:
            raise H1ExportError(
                f"gate {self.name}", f'clock = "cpu" does not count what {provenance.gpu} does', 'set clock = "wall"'
            )
        pair = partial(_model_pair, checkpoint, folder, gate.threads, kernels=kernels, clock=gate.clock)
        kind = f"{host.cpu_kind()} {provenance.gpu}".strip()
        return Makers(
            pair, partial(_artifact_model, folder, gate.threads, kernels, steps=GATE_STEPS), GATE_STEPS, kind=kind
        )


def gate(
    out: Path, checkpoint: Path, gates: Path, progress: Progress = SILENT, kernels: Kernels = "auto"
) -> GateReport:
    """Hold the artifact ``out`` against its baseline, as the file ``gates`` says.

    Raises:
        H1ExportError: a damaged artifact, a faulty file, no baseline, or a checkpoint that it was not built from.
    """
    progress.stage("files and graphs")
    gated = Gated.open(out, gates, checkpoint)
    if gated.name not in gated.baselines:
        raise H1ExportError(gated.place, f"has no baseline for {gated.name}", WRITE)
    then = gated.baselines[gated.name]
    checks = list(counted_checks(gated.now, then, gated.gate))
    progress.stage("memory and timings")
    makers = gated.makers(checkpoint, kernels)
    if makers is None:
        checks.append(
            Check(
                GateCheckKind.MEASUREMENTS,
                Verdict.NOT_APPLICABLE,
                note="nothing on this machine but an emulation runs it",
            )
        )
    else:
        checks += measured_checks(makers, then, gated.gate)
    machine = host.machine_facts() | {"kind": makers.kind if makers else host.cpu_kind()}
    return GateReport(str(out), gated.gate, machine, checks=tuple(checks))


def write_baseline(
    out: Path, checkpoint: Path, gates: Path, progress: Progress = SILENT, kernels: Kernels = "auto"
) -> Path:
    """Make the artifact ``out`` the baseline of its gate and return the file.

    The file keeps other gates, and timings on other kinds of CPU.

    Raises:
        H1ExportError: as ``gate`` does, except that a baseline may be missing.
    """
    progress.stage("files and graphs")
    gated = Gated.open(out, gates, checkpoint)
    now = gated.now
    then = gated.baselines.get(gated.name)
    if then is not None and then.model == now.model:
        now = replace(now, peak_bytes=then.peak_bytes, ratios=then.ratios)
    progress.stage("memory and timings")
    makers = gated.makers(checkpoint, kernels)
    found = now if makers is None else measured(makers, now, gated.gate)
    write_baselines(gated.place, {**gated.baselines, gated.name: found})
    return gated.place


def _artifact_maker(folder: Path, kernels: Kernels, steps: int, threads: int) -> Callable[[], RunnerModel]:
    return partial(_artifact_model, folder, threads, kernels, steps=steps)


def _artifact_model(folder: Path, threads: int, kernels: Kernels, *, steps: int) -> RunnerModel:
    """Make, in a worker process, an artifact's model."""
    pin(threads)
    return RunnerModel(timed_runner(Artifact.open(folder), threads, kernels), steps)


def _reference_model_of(checkpoint: Path, folder: Path, threads: int, *, kernels: Kernels, steps: int) -> RunnerModel:
    """Make, in a worker process, the reference on the artifact's weights; its peak memory includes reading them."""
    pin(threads)
    return reference_model(
        checkpoint, load(Artifact.open(folder), threads, kernels=kernels), threads, steps=steps, clock=time.perf_counter
    )


def _model_pair(checkpoint: Path, folder: Path, threads: int, *, kernels: Kernels, clock: Clock) -> ModelPair:
    """Make, in a worker process, an artifact beside its reference."""
    pin(threads)
    runner = timed_runner(Artifact.open(folder), threads, kernels)
    ours = RunnerModel(runner, GATE_STEPS, CLOCKS[clock])
    return ModelPair(ours, reference_model(checkpoint, runner, threads, steps=REFERENCE_STEPS, clock=CLOCKS[clock]))


def reference_model(
    checkpoint: Path, runner: Inspectable[Any], threads: int, *, steps: int, clock: Callable[[], float]
) -> RunnerModel:
    """Return transformers' model on the weights that ``runner`` stores."""
    torch.set_num_threads(threads)
    reference = Reference(checkpoint)
    reference.hold(runner.stored_weights())
    return RunnerModel(reference, steps, clock, chunk=reference.config.max_position_embeddings)


def timed_runner(artifact: Artifact, threads: int, kernels: Kernels) -> Inspectable[Any]:
    """Load an artifact. Raises H1ExportError where its runtime does not run it here."""
    runner = load(artifact, threads, kernels=kernels)
    if runner.provenance.emulated:
        what = f"is computed by {runner.provenance.kernels} here: its speed says nothing"
        raise H1ExportError(artifact.folder, what, "measure it where its runtime is")
    return runner
