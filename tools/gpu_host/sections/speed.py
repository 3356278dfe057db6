"""Section e: kernels and whole models beside their peers, as shares of the roofline measured on this device."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from gpu_host import bundle, dry
from gpu_host.section import Host, Row

OWN_S = 30  # seconds of the section after which none of our kernels begins
MODELS_S = 45  # seconds of the models
PEERS_S = 108  # seconds of the section after which no kernel begins beside its peers


def run(host: Host) -> Iterator[Row]:
    """Yield the rows of benchmarks/gpu: our kernels, then models, then the kernels beside their peers."""
    start = time.monotonic()
    if host.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it at its import
        dry.use_cpu_provider()
    tree = Path(__file__).parents[3]
    for folder in (tree, tree / "tools"):  # benchmarks/ has a kernels.py, the name of a package of transformers
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    from benchmarks.gpu import ceilings, kernels, models, tuning

    with dry.mended_interpreter() if host.dry else nullcontext():
        measured = ceilings.measure(host.device)
        yield kernels.ceilings_row(measured, host.device)
        bench = kernels.Bench(host.device, measured.gpu)
        own_end = math.inf if host.dry else start + OWN_S
        yield from bench.own(end=own_end)
        yield from bench.parts(end=own_end)
    artifacts = []
    for quant in bundle.QUANTS:
        try:
            artifacts.append(bundle.artifact(host, "embedded" if host.dry else "shape", quant))
        except FileNotFoundError as why:
            yield Row(f"decode {quant}", None if host.dry else False, detail=str(why))
    with tuning.limited():  # transformers takes the peers' kernels
        yield from models.run(host.device, artifacts, budget=MODELS_S, gpu=measured.gpu)
    with dry.mended_interpreter() if host.dry else nullcontext():
        yield from bench.peers(end=math.inf if host.dry else start + PEERS_S)
