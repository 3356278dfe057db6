"""Plan: what a build would make and need, without building."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from h1export import host
from h1export.artifact.weight_file import BLOCK_BYTES
from h1export.checkpoint.store import WeightStore
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import tensor_layout
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.precision import Precision
from h1export.quantize.scheme import QuantScheme
from h1export.quantize.source import QuantizedWeights

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
        out: where the artifact would lie.
        files: name -> bytes. Exact: the graph was lowered, only no weight was read.
        peak_bytes: anonymous memory of the build at its peak.
        seconds: of the build: those that tracing and lowering took, and an estimate from samples of the work on this machine.
        source_bytes: of the checkpoint's tensors.
        disk_free: bytes that the disk of ``out`` has left; the build needs room for ``files`` and ``scratch_bytes``.
        scratch_bytes: what the method keeps on that disk until the build is done.
        state_bytes: context length -> bytes of all states of one sequence.
        precisions: checkpoint tensor -> its precision in the artifact.
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

    @property
    def artifact_bytes(self) -> int:
        return sum(self.files.values())

    def by_precision(self) -> dict[str, int]:
        """Precision -> how many tensors have it."""
        return dict(Counter(self.precisions.values()))


def precisions(integers: QuantizedWeights, config: FalconH1Config) -> dict[str, str]:
    """Tensor of the architecture -> its precision in words."""
    return {name: _words(integers.precisions.get(name)) for name in tensor_layout(config)}


def _words(precision: Precision | None) -> str:
    if precision is None:
        return "float32"
    zeros = ", zero points" if precision.zeros else ""
    return (
        f"int{precision.bits}, {f'block {precision.group_size}' if precision.group_size else 'a scale per row'}{zeros}"
    )


def peak_bytes(jobs: int) -> int:
    """Anonymous memory at a build's peak: what this process holds after lowering without weights, and the blocks of ``jobs`` threads."""
    return host.anonymous_bytes() + (jobs + 1) * BLOCK_BYTES * BLOCK_COPIES


def seconds(
    store: WeightStore, scheme: QuantScheme, integers: QuantizedWeights, artifact_bytes: int, jobs: int
) -> float:
    """How long a build computes weights and writes them; reading is hidden behind it."""
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
    """Bytes left on the disk that ``out`` would lie on."""
    place = next(folder for folder in out.absolute().parents if folder.exists())
    return shutil.disk_usage(place).free
