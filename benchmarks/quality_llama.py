"""What quantisation costs inside llama.cpp: our GGUF files beside its own, for ``quality.py --inside llama.cpp``.

Every file runs in llama.cpp itself and is compared with the file of the same model in float32: mean KL divergence, and
bits per byte. Differences from a rival are paired: both have the same windows of the text, and the bootstrap draws the
same windows for both.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import llama_quantizer
import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from h1export.checkpoint.store import WeightStore
from h1export.commands.build import build_artifact
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array, Ids
from h1export.quantize.calibration import Calibration
from h1export.quantize.scheme import QuantScheme
from h1export.targets.gguf.file_types import BASE
from h1export.targets.gguf.llama import Context, Model
from h1export.targets.gguf.options import GgufOptions
from h1export.targets.gguf.read_back import GgufFile
from h1export.targets.gguf.writer import MODEL
from h1export.validate.accuracy.perplexity import RESAMPLES, WINDOW, Scored, text_figures, windows

OURS: Mapping[str, GgufOptions] = {
    "h1export, shared integers, head q4_0, embedding q8_0": GgufOptions(head="q4_0", embedding="q8_0"),
    "h1export, shared integers (default)": GgufOptions(),
    "h1export --mix q4_k_m": GgufOptions(mix="q4_k_m"),
    "h1export --mix q5_k_m": GgufOptions(mix="q5_k_m"),
}
RIVALS = {  # ours -> the file of llama.cpp that it is compared with
    "h1export --mix q4_k_m": "llama.cpp q4_k_m, importance matrix",
    "h1export --mix q5_k_m": "llama.cpp q5_k_m, importance matrix",
}


@dataclass(frozen=True)
class FileQuality:
    """A file and what it costs; ``difference`` is that from the rival: its name, and figures with standard errors."""

    name: str
    nbytes: int
    figures: dict[str, float]
    rival: str
    difference: dict[str, float]


def measure(checkpoint: Path, ids: Ids, nbytes: int, *, samples: int, threads: int) -> Iterator[FileQuality]:
    """Yield the quality of every file; ``nbytes`` are those of the text ``ids``."""
    parts = windows(ids)
    config = FalconH1Config.load(checkpoint)
    scored: dict[str, list[Scored]] = {}
    with tempfile.TemporaryDirectory(prefix="h1export-quality-") as folder:
        work = Path(folder)
        full = build_artifact(checkpoint, "gguf", work / "full", scheme=QuantScheme("none")).folder / MODEL
        truths = run(full, parts, threads)
        for name, file in _files(checkpoint, config, full, work=work, samples=samples):
            found = run(file, parts, threads)
            scored[name] = [Scored.of(*each) for each in zip(found, truths, parts, strict=True)]
            rival = RIVALS.get(name, "")
            difference = paired(scored[name], scored[rival], nbytes) if rival else {}
            yield FileQuality(name, file.stat().st_size, text_figures(scored[name], nbytes), rival, difference)
            print(name, file=sys.stderr, flush=True)
            file.unlink()


def _files(
    checkpoint: Path, config: FalconH1Config, full: Path, *, work: Path, samples: int
) -> Iterator[tuple[str, Path]]:
    """Yield a name and a file of each kind, llama.cpp's first."""
    calibration = Calibration(samples=samples)
    importance = llama_quantizer.importance_matrix(
        WeightStore.open(checkpoint, config), config, calibration.ids(checkpoint)
    )
    for file_type in BASE:
        for suffix, matrix in (("", {}), (", importance matrix", importance)):
            path = work / MODEL
            llama_quantizer.write(GgufFile(full), path, file_type, config=config, importance=matrix)
            yield f"llama.cpp {file_type}{suffix}", path
    for number, (name, options) in enumerate(OURS.items()):
        scheme = QuantScheme("int4", 32, "gptq")
        out = work / f"ours-{number}"
        artifact = build_artifact(checkpoint, "gguf", out, scheme=scheme, options=options, calibration=calibration)
        yield name, artifact.folder / MODEL


def run(file: Path, parts: list[Ids], threads: int) -> list[Array]:
    """Return llama.cpp's logits [tokens, vocab] for each part of a text, from empty states."""
    model = Model(file)
    context = Context(model, WINDOW, threads)
    found = []
    for part in parts:
        context.clear()
        found.append(context.decode(part[:-1], 0, every=True))
    return found


def paired(ours: list[Scored], theirs: list[Scored], nbytes: int) -> dict[str, float]:
    """Return ours less theirs: mean KL, and bits per byte of a text of ``nbytes``, with standard errors ("_se")."""
    counts = np.array([len(window.kl) for window in ours])
    kl = np.array([a.kl.sum() - b.kl.sum() for a, b in zip(ours, theirs, strict=True)])
    bits = np.array([a.found.sum() - b.found.sum() for a, b in zip(ours, theirs, strict=True)]) / math.log(2)
    bytes_a_token = nbytes / counts.sum()
    draws = np.random.default_rng(0).integers(0, len(counts), (RESAMPLES, len(counts)))
    tokens = counts[draws].sum(1)
    return {
        "kl": float(kl.sum() / counts.sum()),
        "kl_se": float((kl[draws].sum(1) / tokens).std()),
        "bits": float(bits.sum() / nbytes),
        "bits_se": float((bits[draws].sum(1) / tokens / bytes_a_token).std()),
    }


def table(found: list[FileQuality], tokens: int) -> Table:
    """One line a file; losses relative to the file in float32, differences to llama.cpp's file of the same size."""
    result = Table("file, in llama.cpp", "MB", "mean KL", "bits per byte", "less its rival: KL", "bits", box=SIMPLE)
    for file in found:
        f, d = file.figures, file.difference
        loss = f"{100 * (f['ratio'] - 1):+.3f} % ± {100 * f['ratio_se']:.3f}"
        cells = [f"{d[key]:+.5f} ± {d[f'{key}_se']:.5f}" for key in ("kl", "bits")] if d else ["", ""]
        result.add_row(file.name, f"{file.nbytes / 1e6:.3f}", f"{f['kl']:.5f} ± {f['kl_se']:.5f}", loss, *cells)
    full = found[0].figures["reference"]
    result.caption = f"{tokens} tokens of held-out text; the file in float32 has {full:.4f} bits per byte"
    return result
