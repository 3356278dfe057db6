"""Run every check on one artifact and write down what came out."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from h1export.core.artifact import Artifact
from h1export.core.progress import SILENT, Progress
from h1export.core.protocols import Ids, Runner
from h1export.core.report import Report, Row
from h1export.core.state import Array
from h1export.core.weights import WeightStore
from h1export.core.weights.scaling import ScaledStore, Scaling
from h1export.validate import gates
from h1export.validate.bisect import bisect, integers_row
from h1export.validate.latency import PREFILL, measure
from h1export.validate.parity import case_rows, run_cases
from h1export.validate.perplexity import WINDOW, Scored, text_figures, windows
from h1export.validate.reference import Reference
from h1export.validate.weights import weight_errors

INTEGERS = "stored integers"
FP16_MAX = float(np.finfo(np.float16).max)
SOURCE, STORED, DRIFT = "source", "stored", "drift"  # what a row compares; also the first half of its metrics, see gates


@dataclass(frozen=True)
class ValidateOptions:
    """What to run.

    Attributes:
        limits: metric -> limit, overriding the defaults in gates.
        text_ids: token ids of a text for bits per byte; empty: no text.
        text_bytes: bytes that ``text_ids[1:]`` stand for.
        pairs: paired latency runs; 0: no latency.
        seed: of the random token ids.
        bisect: name the first layer and op family beyond tolerance.
    """

    limits: Mapping[str, float] = field(default_factory=dict)
    text_ids: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    text_bytes: int = 0
    pairs: int = 7
    seed: int = 0
    bisect: bool = False


def validate(
    artifact: Artifact, runner: Runner[Any], exact: Runner[Any], checkpoint: Path, options: ValidateOptions, progress: Progress
) -> Report:
    """Compare an artifact with the PyTorch reference on ``checkpoint``, which must be what it was built from.

    ``runner`` is the artifact as it ships, ``exact`` the same in float32 arithmetic (the same Runner where it ships so, or cannot).

    Raises:
        H1ExportError: limits for metrics that do not exist, or a checkpoint that cannot be loaded.
    """
    limits = gates.limits_of(artifact.manifest, runner.capabilities.float32, exact.capabilities.float32, options.limits)
    stored, rows = runner.stored_weights(), []
    scaling = Scaling.load(artifact.folder)
    store = ScaledStore(WeightStore.open(checkpoint, runner.spec), scaling, SILENT)
    if stored:
        progress.stage("stored weights")
        rows.append(_weights_row(artifact, stored, store, limits))
    progress.stage("artifact")
    runs = list(run_cases(runner, options.seed))
    exact_runs = runs if exact is runner else list(run_cases(exact, options.seed))
    if magnitudes := runner.magnitudes():
        rows.append(_fp16_row(magnitudes, limits))
    progress.stage("reference")
    reference = Reference(checkpoint)
    rows += [row for run in runs for row in case_rows({SOURCE: run}, reference, runner, limits)]
    progress.stage("text")
    rows.append(_text_row(runner, reference, options, limits))
    progress.stage("latency")
    rows += _latency_rows(runner, reference, options, limits)
    if stored:
        progress.stage("reference on the stored weights")
        reference.hold({name: store.rows(name, 0, store.shape(name)[0]) for name in scaling.tensors - stored.keys()})
        reference.hold(stored)
        pairs = zip(exact_runs, runs, strict=True)
        ways = [{STORED: run} if exact is runner else {STORED: run, DRIFT: shipped} for run, shipped in pairs]
        lowering = [row for way in ways for row in case_rows(way, reference, runner, limits)]
        rows[1:1] = sorted(lowering, key=lambda row: row.against != STORED)
    if options.bisect:
        progress.stage("layer by layer")
        group = STORED if stored else SOURCE
        rows += [integers_row(row) for row in rows if row.check == INTEGERS]
        rows += bisect(exact, reference, group, limits[f"{group}.states"], options.seed)
    return Report(_subject(artifact, runner), _environment(), tuple(rows))


def _weights_row(artifact: Artifact, stored: Mapping[str, Array], store: WeightStore, limits: Mapping[str, float]) -> Row:
    errors = weight_errors(stored, artifact.manifest.weights, store)
    gated = {name: limits[metric] for name in ("steps", "block") if (metric := f"weights.{name}") in limits}
    (judged,) = gated
    details = {tensor: figures[judged] for tensor, figures in errors.items()}
    worst = max(details, key=details.__getitem__)
    figures = {name: max(found[name] for found in errors.values()) for name in errors[worst]}
    return Row(INTEGERS, SOURCE, figures, gated, note=f"{len(errors)} tensors, worst {worst}", details=details)


def _fp16_row(magnitudes: Mapping[str, float], limits: Mapping[str, float]) -> Row:
    """How near the activations of all cases came to the end of fp16."""
    worst = max(magnitudes, key=lambda op: float(np.nan_to_num(magnitudes[op], nan=np.inf)))
    figures = {"largest": magnitudes[worst], "share": magnitudes[worst] / FP16_MAX}
    note = f"{len(magnitudes)} kinds of op, worst {worst}"
    return Row("fp16 range", "65504", figures, {"share": limits["fp16.share"]}, note=note, details=magnitudes)


def _text_row(runner: Runner[Any], reference: Reference, options: ValidateOptions, limits: Mapping[str, float]) -> Row:
    name = "bits per byte"
    if len(options.text_ids) < 2:
        return Row(name, SOURCE, note="the checkpoint has no tokenizer, or the text is empty")
    if not runner.capabilities.all_logits:
        return Row(name, SOURCE, note="the artifact gives the last position's logits only")
    if (room := runner.capabilities.max_context) is not None and room < WINDOW:
        return Row(name, SOURCE, note=f"windows of {WINDOW} tokens do not fit into {room}")

    def score(window: Ids) -> Array:
        logits: Array = runner.step(window[None, :-1], np.ones((1, len(window) - 1), np.int64), runner.initial(1))[0][0]
        return logits

    scored = (Scored.of(score(window), reference.full(window[:-1])[0], window) for window in windows(options.text_ids))
    figures = text_figures(scored, options.text_bytes)
    return Row(name, SOURCE, figures, {"ratio": limits["text.ratio"]}, note=f"{options.text_bytes} bytes, {len(options.text_ids)} tokens")


def _latency_rows(runner: Runner[Any], reference: Reference, options: ValidateOptions, limits: Mapping[str, float]) -> list[Row]:
    if not options.pairs:
        return [Row("latency", SOURCE, note="not asked for")]
    if runner.capabilities.emulated:
        return [Row("latency", SOURCE, note=f"computed by {runner.capabilities.kernels}: its speed says nothing")]
    prompt = np.random.default_rng(options.seed).integers(0, runner.spec.vocab_size, PREFILL, dtype=np.int64)
    rows = []
    for name, latency in measure(runner, reference, prompt, options.pairs).items():
        figures = {"artifact_s": latency.artifact, "reference_s": latency.reference, "ratio": latency.ratio}
        note = f"median of {options.pairs} interleaved pairs, PyTorch on {torch.get_num_threads()} threads"
        rows.append(Row(f"{name} latency", SOURCE, figures, {"ratio": limits[f"latency.{name}"]}, note=note))
    return rows


def _subject(artifact: Artifact, runner: Runner[Any]) -> dict[str, Any]:
    manifest = artifact.manifest
    described = {"target": manifest.target, "scheme": dict(manifest.scheme), "options": dict(manifest.options), "source": manifest.source}
    capabilities = runner.capabilities
    return described | {"notes": [*capabilities.notes, *filter(None, [capabilities.fallback])]}


def _environment() -> dict[str, Any]:
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {"machine": platform.machine(), "system": platform.system(), "python": platform.python_version(), "packages": packages}
