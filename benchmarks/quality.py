"""Measure what quantisation costs, by method: divergence from the full model and bits per byte on held-out text.

    python benchmarks/quality.py [CHECKPOINT] --ggml .../libggml-base.so --windows 61 --json quality.json

Every method rounds the same tensors, the projections and the head, and transformers computes with the rounded weights
in float32; so this measures the rounding alone, without that of a runtime. The table has h1export's methods, torchao's
asymmetric int4 in groups of 32, GGUF's Q4_0 as the gguf package rounds it, and with ``--ggml``, llama.cpp's library,
its Q4_K without an importance matrix. The script needs the extra `bench`. Without CHECKPOINT, the embedded model.

    python benchmarks/quality.py [CHECKPOINT] --parts

has a line for each kind of tensor instead: what it costs where its tensors alone are in 4 bits; and ``--presets`` has a
line for each preset and each precision of the embedding (quality_presets.py).

    python benchmarks/quality.py [CHECKPOINT] --inside llama.cpp

compares GGUF files inside llama.cpp instead: ours beside llama.cpp's own Q4_0, IQ4_NL, Q4_K_M and Q5_K_M, each with and
without an importance matrix of the same calibration text (quality_llama.py). It needs the extra `gguf`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from h1export import host
from h1export.artifact.stage import Stage
from h1export.checkpoint.resolve import embedded_model, resolve
from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.tokenizer import scoring_ids
from h1export.commands.sensitivity import measure_sensitivity
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array, Ids
from h1export.progress import SILENT
from h1export.quantize.awq_scales import ScaledStore
from h1export.quantize.budget import Budget
from h1export.quantize.calibration import Calibration
from h1export.quantize.choices import CPU
from h1export.quantize.device import ComputeDevice
from h1export.quantize.methods.awq import search_scales
from h1export.quantize.methods.gptq_model import solve_model
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.methods.scale_search import plain_rows, search_rows
from h1export.quantize.precision import Precision
from h1export.quantize.scheme import QuantScheme
from h1export.quantize.source import QuantizedWeights, Rounded
from h1export.validate.accuracy.perplexity import Scored, text_figures, windows
from h1export.validate.accuracy.reference import Reference

GROUP = 32
BUDGET = 5.0
PARTS_BY = ("int4 rtn", "int4 search", "int4 gptq")  # methods of the table by parts
RoundedWeights = dict[str, Array]


@dataclass(frozen=True)
class Quality:
    """What one method costs.

    ``bits`` counts codes, scales and zero points of a quantised weight, and ``seconds`` the time to choose the
    integers.
    """

    method: str
    bits: float
    seconds: float
    figures: dict[str, float]


class Judge:
    """Compares weights with the checkpoint's on some windows of a text."""

    def __init__(self, checkpoint: Path, ids: Ids, nbytes: int) -> None:
        self._reference = Reference(checkpoint)
        self._windows = windows(ids)
        self._nbytes = nbytes
        self._truths = [self._reference.full(window[:-1])[0] for window in self._windows]

    def figures(self, weights: RoundedWeights) -> dict[str, float]:
        """``weights`` by checkpoint name; every call must hold the same names."""
        self._reference.hold(weights)
        pairs = zip(self._windows, self._truths, strict=True)
        return text_figures(
            (Scored.of(self._reference.full(window[:-1])[0], truth, window) for window, truth in pairs), self._nbytes
        )


def own_methods(checkpoint: Path, samples: int) -> Iterator[tuple[str, float, Callable[[], RoundedWeights]]]:
    """(method, bits a weight, how to make the weights) of this project's methods."""
    config = FalconH1Config.load(checkpoint)
    store = WeightStore.open(checkpoint, config)
    four = {
        name: precision
        for name, precision in QuantScheme("int4", GROUP).precisions(config).items()
        if precision.bits == 4
    }
    eight = {name: precision for name, precision in QuantScheme("int8").precisions(config).items() if name in four}

    def weights(integers: QuantizedWeights) -> RoundedWeights:
        return {name: integers.rows(name, 0, store.shape(name)[0]).unfolded() for name in four}

    def gptq(precisions: Mapping[str, Precision]) -> RoundedWeights:
        with tempfile.TemporaryDirectory() as folder:
            ids = Calibration(samples=samples).ids(checkpoint)
            return weights(
                solve_model(
                    store,
                    config,
                    Rounded(store, precisions, plain_rows),
                    ids=ids,
                    stage=Stage(Path(folder), host.cores()),
                    progress=SILENT,
                    device=ComputeDevice.of(CPU),
                )
            )

    def scaled() -> RoundedWeights:
        factors = search_scales(
            store, config, four, ids=Calibration(samples=samples).ids(checkpoint), jobs=host.cores(), progress=SILENT
        )
        found = weights(Rounded(ScaledStore(store, factors, SILENT), four, search_rows))
        return {name: factors.undone(name, weight) for name, weight in found.items()}

    def mixed() -> RoundedWeights:
        return gptq(
            four | Budget(bits=BUDGET).raised(measure_sensitivity(checkpoint, QuantScheme("int4", GROUP, "gptq")))
        )

    yield "int4 rtn", 4 + 16 / GROUP, lambda: weights(Rounded(store, four, quantize_rows))
    yield "int4 search", 4 + 16 / GROUP, lambda: weights(Rounded(store, four, search_rows))
    yield "int4 awq", 4 + 16 / GROUP, scaled
    yield "int4 gptq", 4 + 16 / GROUP, lambda: gptq(four)
    yield f"int4 and int8 gptq, at most {BUDGET} bits", BUDGET, mixed
    rows, values = (sum(count(store.shape(name)) for name in four) for count in (lambda shape: shape[0], prod))
    yield "int8 rtn", 8 + 16 * rows / values, lambda: weights(Rounded(store, eight, quantize_rows))


def peer_methods(checkpoint: Path, library: Path | None) -> Iterator[tuple[str, float, Callable[[], RoundedWeights]]]:
    """The same for torchao and GGUF, on the same tensors."""
    from ggml import Ggml, bits_of
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize, quantize
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    config = FalconH1Config.load(checkpoint)
    store = WeightStore.open(checkpoint, config)
    names = [name for name, precision in QuantScheme("int4", GROUP).precisions(config).items() if precision.bits == 4]

    def torchao(weight: Array) -> Array:
        tensor = torch.from_numpy(weight)
        block = (1, GROUP)
        limits = (0, 15)
        scale, zero = choose_qparams_affine(tensor, MappingType.ASYMMETRIC, block, torch.uint8, *limits, eps=1e-6)
        scale = scale.to(torch.bfloat16).float()
        codes = quantize_affine(tensor, block, scale, zero, torch.uint8, *limits)
        found: Array = dequantize_affine(codes, block, scale, zero, torch.uint8, *limits).numpy()
        return found

    def gguf(weight: Array) -> Array:
        kind = GGMLQuantizationType.Q4_0
        return np.asarray(dequantize(quantize(weight, kind), kind), np.float32)

    methods: list[tuple[str, float, Callable[[Array], Array]]]
    methods = [("torchao int4, asymmetric", 4 + 32 / GROUP, torchao), ("GGUF Q4_0", 4 + 16 / GROUP, gguf)]
    if library is not None:
        methods.append(("GGUF Q4_K", bits_of([store.shape(name) for name in names]), Ggml(library).rounded))
    for name, bits, rounding in methods:
        yield (
            name,
            bits,
            lambda rounding=rounding: {name: rounding(store.rows(name, 0, store.shape(name)[0])) for name in names},
        )  # type: ignore[misc]


def parts_table(checkpoint: Path, judge: Judge, samples: int) -> Table:
    """Return the mean KL where the tensors of one kind alone are in 4 bits, and where all are, by method."""
    made = {name: make() for name, _, make in own_methods(checkpoint, samples) if name in PARTS_BY}
    store = WeightStore.open(checkpoint, FalconH1Config.load(checkpoint))
    full = {name: store.rows(name, 0, store.shape(name)[0]) for name in next(iter(made.values()))}
    kinds = {name: name.split(".")[-2] for name in full}
    result = Table("tensors in 4 bits", *made, title="mean KL", box=SIMPLE)
    for kind in ("", *dict.fromkeys(kinds.values())):
        figures = [
            judge.figures(full | {name: weights[name] for name in weights if kind in ("", kinds[name])})["kl"]
            for weights in made.values()
        ]
        result.add_row(kind or "all", *(f"{figure:.5f}" for figure in figures))
    return result


def table(found: list[Quality], tokens: int) -> Table:
    """One line a method; losses relative to the full model."""
    result = Table("method", "bits a weight", "mean KL", "99 %", "loss, bits per byte", "top-1", "seconds", box=SIMPLE)
    for quality in found:
        f = quality.figures
        cells = (f"{f['kl']:.5f} ± {f['kl_se']:.5f}", f"{f['kl_p99']:.4f} ± {f['kl_p99_se']:.4f}")
        loss = f"{100 * (f['ratio'] - 1):+.3f} % ± {100 * f['ratio_se']:.3f}"
        top1 = f"{f['top1']:.4f} ± {f['top1_se']:.4f}"
        result.add_row(quality.method, f"{quality.bits:.2f}", *cells, loss, top1, f"{quality.seconds:.0f}")
    full = found[0].figures["reference"]
    result.caption = f"{tokens} tokens of held-out text, head included; the full model has {full:.4f} bits per byte"
    return result


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--windows", type=int, default=0, help="of the text, 512 tokens each; 0: all")
    parser.add_argument("--samples", type=int, default=Calibration().samples, help="of the calibration text")
    parser.add_argument("--ggml", type=Path, help="llama.cpp's libggml-base.so, for Q4_K")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", action="store_true", help="what each kind of tensor costs, instead of each method")
    parser.add_argument("--presets", action="store_true", help="what presets and precisions of the embedding cost")
    parser.add_argument("--inside", choices=["torch", "llama.cpp"], default="torch", help="what computes")
    parser.add_argument("--threads", type=int, default=host.cores(), help="of llama.cpp")
    parser.add_argument("--artifact", type=Path, nargs="*", default=[], help="ours for llama.cpp, instead of building")
    args = parser.parse_args()
    checkpoint = resolve(args.checkpoint)
    text = (embedded_model() / "heldout.txt").read_text(encoding="utf-8")
    if args.windows:
        text = text[: 1700 * args.windows]  # about 512 tokens of the embedded model's
    ids, nbytes = scoring_ids(checkpoint, text)
    if args.inside == "llama.cpp":
        import quality_llama

        files = list(
            quality_llama.measure(
                checkpoint, ids, nbytes, samples=args.samples, threads=args.threads, built=args.artifact
            )
        )
        Console().print(quality_llama.table(files, len(ids)))
        save(args.json, files)
        return
    judge = Judge(checkpoint, ids, nbytes)
    if args.parts:
        Console().print(parts_table(checkpoint, judge, args.samples))
        return
    if args.presets:
        import quality_presets

        costs = list(quality_presets.costs(checkpoint, judge, args.samples))
        Console().print(quality_presets.table(costs))
        save(args.json, costs)
        return
    found = []
    for method, bits, make in (*own_methods(checkpoint, args.samples), *peer_methods(checkpoint, args.ggml)):
        start = time.perf_counter()
        weights = make()
        seconds = time.perf_counter() - start
        found.append(Quality(method, bits, seconds, judge.figures(weights)))
        print(method, found[-1].figures, file=sys.stderr, flush=True)
    Console().print(table(found, len(ids)))
    save(args.json, found)


def save(file: Path | None, found: list[Any]) -> None:
    """Write what was found to ``file``, where one is given."""
    if file is not None:
        file.write_text(json.dumps([asdict(quality) for quality in found], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
