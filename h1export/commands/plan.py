"""Plan a build: what it would make and need, without building."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from h1export import host
from h1export.artifact.artifact import NO_SHA256, file_table
from h1export.artifact.manifest import StoredWeight
from h1export.artifact.stage import dry_stage
from h1export.artifact.state_bytes import state_bytes
from h1export.artifact.weight_file import BLOCK_BYTES
from h1export.checkpoint.store import WeightStore
from h1export.commands.build import BuildJob
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import tensor_shapes
from h1export.progress import SILENT, Progress
from h1export.quantize.calibration import Calibration
from h1export.quantize.cost import cost_of
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.precision import Precision
from h1export.quantize.precision_plan import read_measured
from h1export.quantize.presets import PresetPlan, preset_plans
from h1export.quantize.scheme import QuantScheme
from h1export.quantize.source import QuantizedWeights
from h1export.targets import TargetOptions

BLOCK_COPIES = 6  # of a block that rounding and packing hold at a time, in float32
SAMPLE_ROWS = 1024
SAMPLE_COLUMNS = 1024
SAMPLES = 3
WRITES_PER_SECOND = 4e8  # bytes; hashing what was written included


@dataclass(frozen=True)
class Plan:
    """A build before it happens.

    Attributes:
        target: the runtime.
        out: the folder that the artifact would get.
        files: name -> bytes. Exact: the graph was lowered, only no weight was read.
        peak_bytes: anonymous memory of the build at its peak.
        seconds: of the build: the time that tracing and lowering took, and an estimate from samples of the work on this
            machine. Nothing of what a GPU computes is in it, because no GPU has been timed yet.
        gpu: the GPU that computes integers, by its name; empty where the CPU does.
        source_bytes: of the checkpoint's tensors.
        disk_free: bytes that the disk of ``out`` has left; the build needs room for ``files`` and ``scratch_bytes``.
        scratch_bytes: what the method keeps on that disk until the build is done.
        state_bytes: context length -> bytes of all states of one sequence.
        precisions: checkpoint tensor -> its precision in the artifact.
        presets: what int4 costs without a preset, and with each; empty for a build that is not int4.
    """

    target: str
    out: str
    files: Mapping[str, int]
    peak_bytes: int
    seconds: float
    source_bytes: int
    disk_free: int
    scratch_bytes: int
    state_bytes: Mapping[int, int]
    precisions: Mapping[str, str]
    gpu: str = ""
    presets: tuple[PresetPlan, ...] = ()

    @property
    def artifact_bytes(self) -> int:
        return sum(self.files.values())

    def by_precision(self) -> dict[str, int]:
        """Precision -> how many tensors have it."""
        return dict(Counter(self.precisions.values()))


def plan_build(
    checkpoint: Path,
    target: str,
    out: Path,
    *,
    scheme: QuantScheme,
    options: TargetOptions | None = None,
    contexts: Sequence[int] = (),
    progress: Progress = SILENT,
    jobs: int = 0,
    calibration: Calibration = Calibration(),  # noqa: B008  frozen
    adapters: Sequence[Path] = (),
    sensitivity: Path | None = None,
) -> Plan:
    """Plan what ``build_artifact`` with these arguments would do.

    ``contexts`` are the lengths at which the size of the states is given, and ``sensitivity`` is a file with
    what ``h1export sensitivity --json`` printed.

    Raises:
        H1ExportError: a checkpoint, scheme, option or sensitivity that cannot be used.
    """
    measured = None if sensitivity is None else read_measured(sensitivity)
    job = BuildJob.open(
        checkpoint,
        target,
        scheme=scheme,
        options=options,
        calibration=calibration,
        progress=progress,
        adapters=adapters,
    )
    jobs = jobs or host.cores()
    start = time.perf_counter()
    with dry_stage() as stage:
        manifest = job.write(job.manifest(NO_SHA256), stage, progress)
        files = file_table(stage.folder, sizes_only=True)
    lowering = time.perf_counter() - start
    sizes = {name: size for name, (_, size) in files.items()}
    peak = peak_bytes(jobs)
    time_needed = lowering + seconds(job.store, job.scheme, job.integers, artifact_bytes=sum(sizes.values()), jobs=jobs)
    scratch = 0
    if job.ids is not None:
        cost = cost_of(job.scheme, job.store, job.config, tensors=job.integers.precisions, ids=job.ids)
        peak += cost.peak_bytes(jobs)
        time_needed += cost.seconds(jobs) if job.device.is_cpu else 0.0
        scratch = cost.disk_bytes
    return Plan(
        target,
        str(out),
        sizes,
        peak_bytes=peak,
        seconds=time_needed,
        source_bytes=job.store.nbytes,
        disk_free=disk_free(out),
        scratch_bytes=scratch,
        state_bytes={context: state_bytes(manifest, job.config, context) for context in contexts},
        precisions=precisions(job.integers, job.config, manifest.weights),
        gpu="" if job.device.is_cpu else job.device.name,
        presets=preset_plans(job.config, scheme.group_size, measured) if scheme.quant == "int4" else (),
    )


def precisions(integers: QuantizedWeights, config: FalconH1Config, stored: Sequence[StoredWeight]) -> dict[str, str]:
    """Tensor of the architecture -> its precision in words; ``stored`` has what a target stores in another one."""
    found = dict(integers.precisions)
    for weight in stored:
        for part in weight.parts:
            shared = found.get(part.tensor)
            if shared is None or shared.bits != weight.bits:
                found[part.tensor] = Precision(weight.bits, weight.group_size)
    return {name: _words(found.get(name)) for name in tensor_shapes(config)}


def _words(precision: Precision | None) -> str:
    if precision is None:
        return "float32"
    zeros = ", zero points" if precision.zeros else ""
    scales = f"group size {precision.group_size}" if precision.group_size else "a scale per row"
    return f"int{precision.bits}, {scales}{zeros}"


def peak_bytes(jobs: int) -> int:
    """Anonymous memory at a build's peak: of this process after a dry lowering, and the blocks of ``jobs`` threads."""
    return host.anonymous_bytes() + (jobs + 1) * BLOCK_BYTES * BLOCK_COPIES


def seconds(
    store: WeightStore, scheme: QuantScheme, integers: QuantizedWeights, *, artifact_bytes: int, jobs: int
) -> float:
    """Estimate how long a build computes weights and writes them; reading happens at the same time."""
    values = sum(prod(store.shape(name)) for name in integers.precisions)
    return values / _sampled_speed(scheme) / jobs + (artifact_bytes + store.nbytes) / WRITES_PER_SECOND


def _sampled_speed(scheme: QuantScheme) -> float:
    """Weights that one thread rounds in a second."""
    weights = np.random.default_rng(0).standard_normal((SAMPLE_ROWS, SAMPLE_COLUMNS), np.float32)
    precision = Precision(4, scheme.group_size) if scheme.quant == "int4" else Precision(8, 0)
    ones = np.ones(SAMPLE_ROWS, np.float32)
    times = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        quantize_rows(weights, precision, ones)
        times.append(time.perf_counter() - start)
    return weights.size / min(times)


def disk_free(out: Path) -> int:
    """Bytes left on the disk that ``out`` would be stored on."""
    place = next(folder for folder in out.absolute().parents if folder.exists())
    return shutil.disk_usage(place).free
