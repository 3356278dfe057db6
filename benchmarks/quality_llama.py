"""What quantisation costs inside llama.cpp: our GGUF files beside its own, for ``quality.py --inside llama.cpp``.

Every file runs in llama.cpp itself and is compared with the file of the same model in float32: mean KL divergence, and
bits per byte. Differences from a rival are paired: both have the same windows of the text, and the bootstrap draws the
same windows for both.
"""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_quantizer
import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from h1export.artifact.artifact import Artifact
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

OURS = tuple(GgufOptions(mix=mix) for mix in ("shared", "q4_k_m", "q5_k_m"))
RIVALS = {"shared": "q4_k_m"}  # mix -> the file type that it is compared with; another mix: its own name


@dataclass(frozen=True)
class FileQuality:
    """A file and what it costs; ``difference`` is that from the rival: its name, and figures with standard errors."""

    name: str
    nbytes: int
    figures: dict[str, float]
    rival: str
    difference: dict[str, float]


@dataclass(frozen=True)
class Contender:
    """A file, and the name of the one that it is compared with; empty: none."""

    name: str
    file: Path
    rival: str = ""


def measure(
    checkpoint: Path, ids: Ids, nbytes: int, *, samples: int, threads: int, built: Sequence[Path]
) -> Iterator[FileQuality]:
    """Yield the quality of every file; ``nbytes`` are those of the text ``ids``.

    ``built`` are artifacts of ours; none: three are built.
    """
    parts = windows(ids)
    config = FalconH1Config.load(checkpoint)
    scored: dict[str, list[Scored]] = {}
    with tempfile.TemporaryDirectory(prefix="h1export-quality-") as folder:
        work = Path(folder)
        full = build_artifact(checkpoint, "gguf", work / "full", scheme=QuantScheme("none")).folder / MODEL
        truths = run(full, parts, threads)
        calibration = Calibration(samples=samples)
        rivals = _llama_files(checkpoint, config, full, path=work / MODEL, calibration=calibration)
        ours = _ours(checkpoint, work, calibration, built=built)
        for contender in itertools.chain(rivals, ours):
            name, rival = contender.name, contender.rival
            found = run(contender.file, parts, threads)
            scored[name] = [Scored.of(*each) for each in zip(found, truths, parts, strict=True)]
            difference = paired(scored[name], scored[rival], nbytes) if rival else {}
            figures = text_figures(scored[name], nbytes)
            print(name, figures, difference, file=sys.stderr, flush=True)
            yield FileQuality(name, contender.file.stat().st_size, figures, rival, difference)


def _llama_files(
    checkpoint: Path, config: FalconH1Config, full: Path, *, path: Path, calibration: Calibration
) -> Iterator[Contender]:
    """Yield llama.cpp's files, each at ``path``."""
    store = WeightStore.open(checkpoint, config)
    importance = llama_quantizer.importance_matrix(store, config, calibration.ids(checkpoint))
    for file_type in BASE:
        for suffix, matrix in (("", {}), (", importance matrix", importance)):
            llama_quantizer.write(GgufFile(full), path, file_type, config=config, importance=matrix)
            yield Contender(f"llama.cpp {file_type}{suffix}", path)


def _ours(checkpoint: Path, work: Path, calibration: Calibration, *, built: Sequence[Path]) -> Iterator[Contender]:
    """Yield our files: those of ``built``, or one for each of OURS."""
    artifacts = (Artifact.open(folder) for folder in built) if built else _built(checkpoint, work, calibration)
    for artifact in artifacts:
        mix = GgufOptions.read(artifact).mix
        rival = f"llama.cpp {RIVALS.get(mix, mix)}, importance matrix"
        yield Contender(f"h1export --mix {mix}", artifact.folder / MODEL, rival)


def _built(checkpoint: Path, work: Path, calibration: Calibration) -> Iterator[Artifact]:
    scheme = QuantScheme("int4", 32, "gptq")
    for options in OURS:
        out = work / options.mix
        yield build_artifact(checkpoint, "gguf", out, scheme=scheme, options=options, calibration=calibration)


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
