"""The table of `quality.py --presets`: what each preset and each precision of the embedding costs, and its size."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import get_args

import numpy as np
from quality import Judge, RoundedWeights
from rich.box import SIMPLE
from rich.table import Column, Table

from h1export import host
from h1export.artifact.stage import Stage
from h1export.checkpoint.store import WeightStore
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import EMBEDDING, projection_of, tensor_shapes
from h1export.progress import SILENT
from h1export.quantize.calibration import Calibration
from h1export.quantize.choices import CPU, OF_EMBEDDING, Preset
from h1export.quantize.device import ComputeDevice
from h1export.quantize.methods.select import integers_of
from h1export.quantize.presets import chosen_by
from h1export.quantize.scheme import QuantScheme

HALF = "fp16"


@dataclass(frozen=True)
class Choice:
    """A scheme by GPTQ, and whether its embedding is in fp16."""

    name: str
    scheme: QuantScheme
    half: bool = False


@dataclass(frozen=True)
class Cost:
    """What a choice costs: bytes of all matrices, their bits a weight, and the figures of the text."""

    name: str
    nbytes: int
    bits: float
    figures: dict[str, float]


def choices(config: FalconH1Config) -> Iterator[Choice]:
    """Yield the default, the embedding's precisions, and the presets."""
    default = QuantScheme("int4", 32, "gptq")
    yield Choice("int4, the default", default)
    for embedding in OF_EMBEDDING:
        yield Choice(f"--embedding {embedding}", default.with_embedding(embedding), embedding == HALF)
    for preset in get_args(Preset):
        yield Choice(f"--preset {preset}", QuantScheme("int4", 32, "gptq", chosen_by(preset, config)))


def costs(checkpoint: Path, judge: Judge, samples: int) -> Iterator[Cost]:
    """Yield the cost of every choice; the same projections are solved once."""
    config = FalconH1Config.load(checkpoint)
    store = WeightStore.open(checkpoint, config)
    ids = Calibration(samples=samples).ids(checkpoint)
    names = [name for name in tensor_shapes(config) if projection_of(name) is not None]
    shapes: Mapping[str, tuple[int, int]] = {name: store.shape(name)[:2] for name in names}  # type: ignore[misc]
    solved: dict[str, RoundedWeights] = {}
    for choice in choices(config):
        precisions = choice.scheme.precisions(config)
        key = repr([item for item in precisions.items() if item[0] != EMBEDDING or config.tie_word_embeddings])
        full = {name: store.rows(name, 0, store.shape(name)[0]) for name in names}
        with tempfile.TemporaryDirectory() as folder:
            stage = Stage(Path(folder), host.cores(), dry=key in solved)  # dry: plain rounding is enough
            found = integers_of(
                store, config, choice.scheme, ids=ids, stage=stage, progress=SILENT, device=ComputeDevice.of(CPU)
            ).integers
            weights = {name: found.rows(name, 0, shapes[name][0]).unfolded() for name in precisions}
        kept = {name: value for name, value in solved.get(key, {}).items() if name in precisions}
        if not config.tie_word_embeddings:
            kept.pop(EMBEDDING, None)
        weights |= kept
        solved.setdefault(key, dict(weights))
        if choice.half:
            weights[EMBEDDING] = full[EMBEDDING].astype(np.float16).astype(np.float32)
        bits = sum(
            precisions[name].stored_bits(shape) if name in precisions else 16 * prod(shape)
            for name, shape in shapes.items()
        )
        figures = judge.figures(full | weights)
        yield Cost(choice.name, bits // 8, bits / sum(map(prod, shapes.values())), figures)


def table(found: list[Cost]) -> Table:
    """Return a line for each choice."""
    result = Table(Column("choice", no_wrap=True), "MB", "bits", "mean KL", "99 %", "loss", "top-1", box=SIMPLE)
    for cost in found:
        f = cost.figures
        result.add_row(
            cost.name,
            f"{cost.nbytes / 1e6:.3f}",
            f"{cost.bits:.2f}",
            f"{f['kl']:.5f} ± {f['kl_se']:.5f}",
            f"{f['kl_p99']:.4f}",
            f"{100 * (f['ratio'] - 1):+.3f} % ± {100 * f['ratio_se']:.3f}",
            f"{f['top1']:.4f}",
        )
    return result
