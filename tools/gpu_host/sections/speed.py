"""Section e: kernels and whole models beside their peers, as shares of the roofline measured on this device."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from gpu_host import bundle, dry
from gpu_host.section import Host, Row

KERNELS_S = 50  # seconds of the section's limit after which no further case begins
MODELS_S = 35


def run(host: Host) -> Iterator[Row]:
    """Yield the rows of benchmarks/gpu: kernels first, then models."""
    if host.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it at its import
        dry.use_cpu_provider()
    tree = Path(__file__).parents[3]
    for folder in (tree, tree / "tools"):  # benchmarks/ has a kernels.py, the name of a package of transformers
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    from benchmarks.gpu import kernels, models

    with dry.mended_interpreter() if host.dry else nullcontext():
        yield from kernels.run(host.device, budget=KERNELS_S)
    artifacts = []
    for quant in bundle.QUANTS:
        try:
            artifacts.append(bundle.artifact(host, "embedded" if host.dry else "shape", quant))
        except FileNotFoundError as why:
            yield Row(f"decode {quant}", None if host.dry else False, detail=str(why))
    yield from models.run(host.device, artifacts, budget=MODELS_S)
