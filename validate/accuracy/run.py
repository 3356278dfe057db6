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

from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import Manifest
from h1export.checkpoint.store import WeightStore
from h1export.model.falcon_h1.states import Array, Ids
from h1export.progress import SILENT, Progress
from h1export.quantize.awq_scales import AwqScales, ScaledStore
from h1export.report.histogram import Histogram
from h1export.report.report import KL, LOGIT_ERROR, Report, Row
from h1export.runtime.runner import Comparable, Inspectable, Runner, TracksMagnitudes
from h1export.validate.accuracy import tolerances
from h1export.validate.accuracy.bisect import bisect, integers_row
from h1export.validate.accuracy.greedy_agreement import CHECK as GREEDY
from h1export.validate.accuracy.greedy_agreement import (
    Continuation,
    continuations,
    greedy_agreement_row,
    impossible,
    prompts,
)
from h1export.validate.accuracy.latency import PREFILL, measure, tokens_needed
from h1export.validate.accuracy.long_contexts import context_rows, cost_rows
from h1export.validate.accuracy.parity import Run, case_rows, run_cases
from h1export.validate.accuracy.perplexity import WINDOW, Scored, text_figures, windows
from h1export.validate.accuracy.reference import Reference
from h1export.validate.accuracy.weights import weight_errors

INTEGERS = "stored integers"
FP16_MAX = float(np.finfo(np.float16).max)
# what a row compares; also the first half of its metrics, see gates
SOURCE = "source"
STORED = "stored"
DRIFT = "drift"


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
        prompts: greedy texts, from places in the text; 0: none.
        contexts: lengths at which to compare states after a prefill in chunks, and to time tokens.
    """

    limits: Mapping[str, float] = field(default_factory=dict)
    text_ids: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    text_bytes: int = 0
    pairs: int = 7
    seed: int = 0
    bisect: bool = False
    prompts: int = 8
    contexts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Subject:
    """Who is judged, and by what.

    Attributes:
        runner: the artifact as it ships.
        exact: the same in float32 arithmetic; ``runner`` itself where it ships so, or cannot.
        stored: checkpoint name -> float32 tensor, of what is quantised, or scaled for that.
        limits: metric -> limit.
        options: what to run.
    """

    runner: Comparable[Any]
    exact: Comparable[Any]
    stored: Mapping[str, Array]
    limits: Mapping[str, float]
    options: ValidateOptions

    @property
    def ways(self) -> dict[str, Comparable[Any]]:
        """The ways in which lowering is judged, by their group of metrics, against a reference that holds ``stored``."""
        if not self.stored:
            return {SOURCE: self.runner}
        return {STORED: self.exact} | ({} if self.exact is self.runner else {DRIFT: self.runner})


def validate(
    artifact: Artifact,
    runner: Inspectable[Any],
    exact: Inspectable[Any],
    checkpoint: Path,
    options: ValidateOptions,
    progress: Progress,
) -> Report:
    """Compare an artifact with the PyTorch reference on ``checkpoint``, which must be what it was built from.

    ``runner`` and ``exact`` are those of Trial.

    Raises:
        H1ExportError: limits for metrics that do not exist, or a checkpoint that cannot be loaded.
    """
    limits = tolerances.limits_of(
        artifact.manifest, runner.provenance.float32, exact.provenance.float32, chosen=options.limits
    )
    stored = runner.stored_weights()
    rows = []
    scaling = AwqScales.load(artifact.folder)
    store = ScaledStore(WeightStore.open(checkpoint, runner.config), scaling, SILENT)
    if stored:
        progress.stage("stored weights")
        rows.append(_weights_row(artifact, stored, store, limits=limits))
    scaled = {name: store.rows(name, 0, store.shape(name)[0]) for name in scaling.tensors - stored.keys()}
    trial = Subject(runner, exact, {**stored, **scaled} if scaled else stored, limits=limits, options=options)
    rows += _rows(trial, Reference(checkpoint), progress)
    if options.bisect:
        rows += [integers_row(row) for row in rows if row.check == INTEGERS]
    return Report(_described(artifact.manifest) | _shown(runner), _environment(), tuple(rows))


def judge(
    runner: Comparable[Any],
    checkpoint: Path,
    options: ValidateOptions = ValidateOptions(),
    progress: Progress = SILENT,
) -> Report:
    """Compare any Runner with the PyTorch reference on ``checkpoint``, as ``validate`` does an artifact that is not quantised.

    Raises:
        H1ExportError: limits for metrics that do not exist, or a checkpoint that cannot be loaded.
    """
    float32 = runner.provenance.float32
    limits = tolerances.limits("none", "rtn", float32, exact=float32, chosen=options.limits)
    rows = _rows(Subject(runner, runner, {}, limits=limits, options=options), Reference(checkpoint), progress)
    return Report(_shown(runner), _environment(), tuple(rows))


@dataclass(frozen=True)
class Outputs:
    """What a runner said to the cases, and its greedy texts; ``silent``: why there are none."""

    runs: list[Run]
    texts: list[Continuation]
    silent: str

    @classmethod
    def of(cls, runner: Comparable[Any], options: ValidateOptions) -> Outputs:
        """Ask ``runner``."""
        starts = prompts(options.text_ids, options.prompts, options.seed)
        silent = impossible(runner, starts)
        return cls(list(run_cases(runner, options.seed)), [] if silent else list(continuations(runner, starts)), silent)

    def greedy(self, group: str, reference: Reference) -> Row:
        return (
            Row(GREEDY, group, note=self.silent) if self.silent else greedy_agreement_row(group, self.texts, reference)
        )


def _rows(trial: Subject, reference: Reference, progress: Progress) -> list[Row]:
    """Everything but the integers: against the checkpoint's weights, then against the stored ones, which become the reference's."""
    runner = trial.runner
    options = trial.options
    limits = trial.limits
    progress.stage("artifact")
    shipped = Outputs.of(runner, options)
    judged = {group: shipped if way is runner else Outputs.of(way, options) for group, way in trial.ways.items()}
    magnitudes = runner.magnitudes() if isinstance(runner, TracksMagnitudes) else {}
    rows = [_fp16_row(magnitudes, limits)] if magnitudes else []
    progress.stage("reference")
    rows += [row for run in shipped.runs for row in case_rows({SOURCE: run}, reference, runner, limits=limits)]
    progress.stage("text")
    rows += [_text_row(runner, reference, options, limits=limits), shipped.greedy(SOURCE, reference)]
    progress.stage("latency")
    rows += _latency_rows(runner, reference, options, limits=limits)
    if trial.stored:
        progress.stage("reference on the stored weights")
        reference.hold(trial.stored)
        request = zip(*(answers.runs for answers in judged.values()), strict=True)
        lowering = [
            row
            for runs in request
            for row in case_rows(dict(zip(judged, runs, strict=True)), reference, runner, limits=limits)
        ]
        rows = [*sorted(lowering, key=lambda row: row.against != STORED), *rows]
        rows += [answers.greedy(group, reference) for group, answers in judged.items()]
    if options.contexts:
        progress.stage("long contexts")
        rows += context_rows(trial.ways, reference, options.contexts, limits=limits, seed=options.seed)
        rows += cost_rows(runner, options.contexts, SOURCE, seed=options.seed)
    if options.bisect:
        progress.stage("layer by layer")
        group = next(iter(trial.ways))
        rows += bisect(trial.exact, reference, group, limit=limits[f"{group}.states"], seed=options.seed)
    return rows


def _weights_row(
    artifact: Artifact, stored: Mapping[str, Array], store: WeightStore, *, limits: Mapping[str, float]
) -> Row:
    errors = weight_errors(stored, artifact.manifest.weights, store)
    gated = {name: limits[metric] for name in ("steps", "block") if (metric := f"weights.{name}") in limits}
    (judged,) = gated
    details = {tensor: figures[judged] for tensor, figures in errors.items()}
    worst = max(details, key=details.__getitem__)
    figures = {name: max(found[name] for found in errors.values()) for name in errors[worst]}
    return Row(INTEGERS, SOURCE, figures, limits=gated, note=f"{len(errors)} tensors, worst {worst}", details=details)


def _fp16_row(magnitudes: Mapping[str, float], limits: Mapping[str, float]) -> Row:
    """How near the activations of all cases came to the end of fp16."""
    worst = max(magnitudes, key=lambda op: float(np.nan_to_num(magnitudes[op], nan=np.inf)))
    figures = {"largest": magnitudes[worst], "share": magnitudes[worst] / FP16_MAX}
    note = f"{len(magnitudes)} kinds of op, worst {worst}"
    return Row("fp16 range", "65504", figures, limits={"share": limits["fp16.share"]}, note=note, details=magnitudes)


def _text_row(
    runner: Runner[Any], reference: Reference, options: ValidateOptions, *, limits: Mapping[str, float]
) -> Row:
    name = "bits per byte"
    if len(options.text_ids) < 2:
        return Row(name, SOURCE, note="the checkpoint has no tokenizer, or the text is empty")
    if not runner.limits.all_logits:
        return Row(name, SOURCE, note="the artifact gives the last position's logits only")
    if (room := runner.limits.max_context) is not None and room < WINDOW:
        return Row(name, SOURCE, note=f"windows of {WINDOW} tokens do not fit into {room}")

    def score(window: Ids) -> Array:
        logits: Array = runner.step(window[None, :-1], np.ones((1, len(window) - 1), np.int64), runner.initial(1))[0][0]
        return logits

    scored = [Scored.of(score(window), reference.full(window[:-1])[0], window) for window in windows(options.text_ids)]
    spread = {KL: [window.kl for window in scored], LOGIT_ERROR: [window.error for window in scored]}
    histograms = {values: Histogram.of(np.concatenate(parts)) for values, parts in spread.items()}
    note = f"{options.text_bytes} bytes, {len(options.text_ids)} tokens"
    figures = text_figures(scored, options.text_bytes)
    gated = {"ratio": limits["text.ratio"]}
    return Row(name, SOURCE, figures, limits=gated, note=note, histograms=histograms)


def _latency_rows(
    runner: Runner[Any], reference: Reference, options: ValidateOptions, *, limits: Mapping[str, float]
) -> list[Row]:
    if not options.pairs:
        return [Row("latency", SOURCE, note="not asked for")]
    if runner.provenance.emulated:
        return [Row("latency", SOURCE, note=f"computed by {runner.provenance.kernels}: its speed says nothing")]
    if (room := runner.limits.max_context) is not None and room < (needed := tokens_needed(options.pairs)):
        return [Row("latency", SOURCE, note=f"{needed} tokens do not fit into {room}")]
    prompt = np.random.default_rng(options.seed).integers(0, runner.config.vocab_size, PREFILL, dtype=np.int64)
    rows = []
    for name, latency in measure(runner, reference, prompt, options.pairs).items():
        figures = {"artifact_s": latency.artifact, "reference_s": latency.reference, "ratio": latency.ratio}
        note = f"median of {options.pairs} interleaved pairs, PyTorch on {torch.get_num_threads()} threads"
        rows.append(Row(f"{name} latency", SOURCE, figures, limits={"ratio": limits[f"latency.{name}"]}, note=note))
    return rows


def _described(manifest: Manifest) -> dict[str, Any]:
    return {
        "target": manifest.target,
        "scheme": dict(manifest.scheme),
        "options": dict(manifest.options),
        "source": manifest.source,
    }


def _shown(runner: Runner[Any]) -> dict[str, Any]:
    computed = runner.provenance
    return {"kernels": computed.kernels, "notes": [*runner.notes, *filter(None, [computed.fallback])]}


def _environment() -> dict[str, Any]:
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": packages,
    }
