"""Measure how much each weight's precision matters."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from h1export import host
from h1export.artifact.stage import Stage
from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.vocabulary import check_vocabulary
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.progress import SILENT, Progress
from h1export.quantize.budget import Sensitivity
from h1export.quantize.calibration import Calibration
from h1export.quantize.device import ComputeDevice
from h1export.quantize.methods.select import integers_of
from h1export.quantize.scheme import QuantScheme
from h1export.quantize.sensitivity import sensitivities

SAMPLES = 4  # of the calibration text; each runs through half the model once for every tensor


def measure_sensitivity(
    checkpoint: Path,
    scheme: QuantScheme,
    calibration: Calibration = Calibration(),  # noqa: B008  frozen
    *,
    progress: Progress = SILENT,
    jobs: int = 0,
    adapters: Sequence[Path] = (),
) -> dict[str, Sensitivity]:
    """Measure the sensitivity of every quantised weight, with the integers that the scheme's method gives it.

    The first samples of the calibration text are the inputs; ``jobs`` threads compute (0: one a core).

    Raises:
        H1ExportError: a checkpoint, scheme or calibration text that cannot be used.
    """
    device = ComputeDevice.of(calibration.device)
    config = FalconH1Config.load(checkpoint)
    store = WeightStore.open(checkpoint, config, adapters=adapters)
    scheme.check(config)
    check_vocabulary(checkpoint, config.vocab_size)
    ids = calibration.ids(checkpoint)
    jobs = jobs or host.cores()
    with tempfile.TemporaryDirectory(prefix="h1export-sensitivity-") as folder:
        stage = Stage(Path(folder), jobs)
        store, integers, _ = integers_of(store, config, scheme, ids=ids, stage=stage, progress=progress, device=device)
        return sensitivities(store, config, integers, ids=ids[:SAMPLES], jobs=jobs, progress=progress, device=device)
