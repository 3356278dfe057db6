"""Section f: GPTQ of the 0.5B shape on the host's device, its parts, and its integers beside a CPU's."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from make_checkpoint import config, write_checkpoint

from gpu_host import bundle
from gpu_host.section import Figure, Host, Row
from h1export import host as machine
from h1export.artifact.stage import Stage
from h1export.checkpoint.resolve import embedded_model
from h1export.checkpoint.store import WeightStore
from h1export.commands.build import build_artifact
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.progress import SILENT
from h1export.quantize.calibration import Calibration
from h1export.quantize.device import ComputeDevice
from h1export.quantize.layers import weights_by_input
from h1export.quantize.methods.gptq_model import solve_model
from h1export.quantize.methods.select import uncalibrated_integers
from h1export.quantize.scheme import QuantScheme
from h1export.targets.onnxruntime.options import OrtOptions

LIMIT_S = 60  # of the build, on a GPU
SCHEME = QuantScheme("int4", 32, "gptq")
COMPARED_SAMPLES = 8  # sequences of the comparison: 4096 tokens, twice the columns of the widest projection
DRY_TEXT = Calibration(samples=4, length=64)
DRY_LAYERS = 2
DRY_SIZES = {"hidden_size": 256, "intermediate_size": 384}
# The share of codes of layer 0 that both devices must choose alike. There both see the same inputs, and only the order
# of sums differs, which turns a code only where its weight lies next to a tie. Another order of sums alone left at
# least 0.998 of each tensor equal on a CPU, and plain rounding in place of GPTQ leaves clearly less than this.
LEAST_EQUAL = 0.98

Codes = Mapping[str, npt.NDArray[np.int8]]


class Stopwatch:
    """A Progress that adds up the seconds of GPTQ's layers, of its head, and of the rest of a build."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._part = "rest_s"
        self._since = time.monotonic()

    def stage(self, name: str, total_bytes: int = 0) -> None:
        """End the last stage, and begin the next one."""
        now = time.monotonic()
        self.seconds[self._part] += now - self._since
        self._since = now
        self._part = "head_s" if name == "GPTQ, head" else "layers_s" if name.startswith("GPTQ, layer") else "rest_s"

    def advance(self, nbytes: int) -> None:
        """Do nothing."""


def run(host: Host) -> Iterator[Row]:
    """Yield a row of layer 0's codes beside a CPU's, and one of the whole build."""
    try:
        checkpoint = _dry_checkpoint(host.work) if host.dry else bundle.checkpoint(host)
        text = replace(DRY_TEXT if host.dry else Calibration(), device=host.device)
        name = f"GPTQ of {'a small' if host.dry else 'the 0.5B'} shape"
        yield compared(f"{name}, layer 0 beside a CPU", *_both_codes(checkpoint, text))
        yield _built(name, host, checkpoint, text=text)
    except (H1ExportError, FileNotFoundError) as error:
        yield Row("GPTQ", False, detail=str(error))


def _dry_checkpoint(work: Path) -> Path:
    """Write a random checkpoint of two narrow layers of the smallest shape, with the embedded model's vocabulary."""
    folder = work / "calibration-checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    vocab = FalconH1Config.load(embedded_model()).vocab_size
    settings = config("tiny-90M", DRY_LAYERS) | DRY_SIZES | {"vocab_size": vocab}
    write_checkpoint(folder, settings, 1, seed=0)
    return folder


def _both_codes(checkpoint: Path, text: Calibration) -> tuple[Codes, Codes]:
    """Return the codes of layer 0 by the host's device, and by a CPU."""
    part = replace(text, samples=min(text.samples, COMPARED_SAMPLES))
    return layer_codes(checkpoint, part), layer_codes(checkpoint, replace(part, device="cpu"))


def layer_codes(checkpoint: Path, text: Calibration) -> Codes:
    """Solve layer 0 alone by GPTQ on ``text`` and its device, and return the codes of every projection."""
    whole = FalconH1Config.load(checkpoint)
    store = WeightStore.open(checkpoint, whole)
    first = replace(whole, num_hidden_layers=1)
    names = [name for group in weights_by_input(0).values() for name in group]
    others = set(SCHEME.precisions(first)) - set(names)
    rest = uncalibrated_integers(store, first, replace(SCHEME, chosen=dict.fromkeys(others, "none")))
    with tempfile.TemporaryDirectory(prefix="h1export-calibration-") as folder:
        stage = Stage(Path(folder), machine.cores())
        device = ComputeDevice.of(text.device)
        ids = text.ids(checkpoint)
        solved = solve_model(store, first, rest, ids=ids, stage=stage, progress=SILENT, device=device)
        return {name: solved.rows(name, 0, store.shape(name)[0]).codes for name in names}


def compared(name: str, ours: Codes, theirs: Codes) -> Row:
    """Return the row of the shares of equal codes; the lowest one of a tensor decides."""
    shares = {tensor: float(np.mean(ours[tensor] == codes)) for tensor, codes in theirs.items()}
    worst = min(shares, key=shares.__getitem__)
    figures: dict[str, Figure] = {"tensors": len(shares), "least_equal": round(shares[worst], 5), "tensor": worst}
    return Row(name, shares[worst] >= LEAST_EQUAL, figures)


def _built(name: str, host: Host, checkpoint: Path, *, text: Calibration) -> Row:
    """Build the artifact for ONNX Runtime's CUDA provider, and return the row of its seconds and its memory."""
    out = host.work / "calibration-artifact"
    place = ComputeDevice.of(text.device).place
    if not host.dry:
        torch.cuda.reset_peak_memory_stats(place)
    watch = Stopwatch()
    start = time.monotonic()
    build_artifact(
        checkpoint,
        "ort",
        out,
        scheme=SCHEME,
        options=OrtOptions(graph="cuda"),
        force=True,
        progress=watch,
        calibration=text,
    )
    total = time.monotonic() - start
    watch.stage("")
    figures: dict[str, Figure] = {"total_s": round(total, 2)}
    figures |= {part: round(seconds, 2) for part, seconds in sorted(watch.seconds.items())}
    figures |= {"samples": text.samples, "length": text.length}
    if not host.dry:
        figures["peak_device_mb"] = round(torch.cuda.max_memory_allocated(place) / 1e6)
    shutil.rmtree(out)
    return Row(name, None if host.dry else total <= LIMIT_S, figures)
