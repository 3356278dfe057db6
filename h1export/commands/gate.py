"""Hold an artifact against the baseline of its gate: files, graphs, memory, and timings relative to the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from h1export import host
from h1export.artifact.artifact import Artifact
from h1export.commands.load import check_source, load_runner
from h1export.commands.worker_models import GATE_STEPS, artifact_model, model_pair
from h1export.errors import H1ExportError
from h1export.progress import SILENT, Progress
from h1export.report.report import Verdict
from h1export.targets import Kernels, get_target
from h1export.validate.speed.gate_checks import Check, GateCheckKind
from h1export.validate.speed.gate_file import Baseline, Clock, Gate, read_baselines, read_gates, write_baselines
from h1export.validate.speed.regression import (
    WRITE,
    GateReport,
    Makers,
    counted,
    counted_checks,
    measured,
    measured_checks,
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
    def open(cls, out: Path, gates: Path, checkpoint: Path, *, adapters: Sequence[Path]) -> Gated:
        """Count files and ops of the artifact ``out`` for its gate in the file ``gates``.

        Raises:
            H1ExportError: a damaged artifact, no gate for it, or another ``checkpoint`` or ``adapters`` than its own.
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
            check_source(artifact, checkpoint, adapters)
        now = counted(artifact, mine[0], get_target(manifest.target).operations(artifact))
        return cls(artifact, mine[0], now, place=place, baselines=read_baselines(place))

    @property
    def name(self) -> str:
        return f"{self.gate.target} {self.gate.quant}"

    def makers(self, checkpoint: Path, kernels: Kernels, adapters: Sequence[Path]) -> Makers | None:
        """Return the functions that make the models to time; None where only an emulation runs the artifact here.

        Raises:
            H1ExportError: the artifact runs on a GPU, whose time the gate's clock does not count.
        """
        gate = self.gate
        folder = self.artifact.folder
        provenance = load_runner(self.artifact, gate.threads, kernels=kernels).provenance
        if provenance.emulated:
            return None
        if provenance.gpu and gate.clock is Clock.CPU and gate.timings:
            raise H1ExportError(
                f"gate {self.name}", f'clock = "cpu" does not count what {provenance.gpu} does', 'set clock = "wall"'
            )
        pair = partial(
            model_pair, checkpoint, folder, gate.threads, kernels=kernels, clock=gate.clock, adapters=adapters
        )
        kind = f"{host.cpu_kind()} {provenance.gpu}".strip()
        return Makers(
            pair, partial(artifact_model, folder, gate.threads, kernels, steps=GATE_STEPS), GATE_STEPS, kind=kind
        )


def gate_artifact(
    out: Path,
    checkpoint: Path,
    gates: Path,
    *,
    progress: Progress = SILENT,
    kernels: Kernels = "auto",
    adapters: Sequence[Path] = (),
) -> GateReport:
    """Compare the artifact ``out`` with its baseline, by the rules of the file ``gates``.

    ``adapters`` are the folders of the adapters that it was built with, in order.

    Raises:
        H1ExportError: a damaged artifact, a faulty file, no baseline, or a checkpoint that it was not built from.
    """
    progress.stage("files and graphs")
    gated = Gated.open(out, gates, checkpoint, adapters=adapters)
    if gated.name not in gated.baselines:
        raise H1ExportError(gated.place, f"has no baseline for {gated.name}", WRITE)
    then = gated.baselines[gated.name]
    checks = list(counted_checks(gated.now, then, gated.gate))
    progress.stage("memory and timings")
    makers = gated.makers(checkpoint, kernels, adapters)
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
    out: Path,
    checkpoint: Path,
    gates: Path,
    *,
    progress: Progress = SILENT,
    kernels: Kernels = "auto",
    adapters: Sequence[Path] = (),
) -> Path:
    """Make the artifact ``out`` the baseline of its gate, and return the file.

    Baselines of other gates and timings on other kinds of CPU stay as they are. ``adapters`` are those that ``out`` was
    built with.

    Raises:
        H1ExportError: as in ``gate_artifact``, a missing baseline excepted.
    """
    progress.stage("files and graphs")
    gated = Gated.open(out, gates, checkpoint, adapters=adapters)
    now = gated.now
    then = gated.baselines.get(gated.name)
    if then is not None and then.model == now.model:
        now = replace(now, peak_bytes=then.peak_bytes, ratios=then.ratios)
    progress.stage("memory and timings")
    makers = gated.makers(checkpoint, kernels, adapters)
    found = now if makers is None else measured(makers, now, gated.gate)
    write_baselines(gated.place, {**gated.baselines, gated.name: found})
    return gated.place
