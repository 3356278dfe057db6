"""Run every check on one artifact and collect the rows of its report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.store import WeightStore, weight_files
from h1export.model.falcon_h1.states import Array
from h1export.progress import SILENT, Progress
from h1export.quantize.awq_scales import AwqScales, ScaledStore
from h1export.report.checks import CheckKind, Comparison, Phase
from h1export.report.report import Report, Row
from h1export.runtime.runner import Comparable, Inspectable, Runner, StoresRoundedFloats, TracksMagnitudes
from h1export.validate.accuracy import tolerances as defaults
from h1export.validate.accuracy.bisect import bisect, integers_row
from h1export.validate.accuracy.cost import cost_row, integers_of
from h1export.validate.accuracy.facts import environment_facts, runner_facts, subject_facts
from h1export.validate.accuracy.greedy_agreement import (
    Continuation,
    continuations,
    greedy_agreement_row,
    prompts,
    why_no_texts,
)
from h1export.validate.accuracy.latency import PREFILL_TOKENS, Latency, measure, tokens_needed
from h1export.validate.accuracy.long_contexts import context_rows, cost_rows
from h1export.validate.accuracy.parity import JudgedRun, Run, case_rows, run_cases
from h1export.validate.accuracy.published_proofs import published_rows
from h1export.validate.accuracy.reference import Reference
from h1export.validate.accuracy.text_rows import NOT_REQUESTED, Text, text_rows
from h1export.validate.accuracy.weights import weight_errors

FP16_MAX = float(np.finfo(np.float16).max)
LOWERING = (Comparison.STORED, Comparison.DRIFT)  # what a report says first of the cases
AFTER_LOWERING = (CheckKind.FP16_RANGE, CheckKind.CASE)


@dataclass(frozen=True)
class ValidateOptions:
    """What to run, and the tolerances that replace defaults.

    Attributes:
        tolerances: metric -> tolerance, overriding the defaults of tolerances.py.
        text: the text for bits per byte and greedy texts.
        pairs: the number of paired latency runs; 0 means that latency is not measured.
        seed: the seed of the random token ids.
        bisect: whether to name the first layer and op family beyond tolerance.
        prompts: the number of greedy texts, which start at places in the text.
        contexts: the numbers of tokens at which to compare states after a prefill in chunks, and to time tokens.
        adapters: folders of the adapters that the artifact was built with, in order.
        quick: whether only the cases that are ``quick`` run.
    """

    tolerances: Mapping[str, float] = field(default_factory=dict)
    text: Text = NOT_REQUESTED
    pairs: int = 7
    seed: int = 0
    bisect: bool = False
    prompts: int = 8
    contexts: tuple[int, ...] = ()
    adapters: tuple[Path, ...] = ()
    quick: bool = False


@dataclass(frozen=True)
class Validation:
    """The runners of one validation, the weights that the reference is to hold, and what to run.

    Attributes:
        runner: runs the artifact as it ships.
        exact: runs it in float32 arithmetic; it is ``runner`` where that does so, or where the runtime cannot.
        stored: checkpoint name -> float32 tensor, for the weights that are quantised, or scaled for quantisation.
        tolerances: metric -> tolerance.
        options: what to run.
        integers: the name of the artifact's shortest integers; empty where it has none.
    """

    runner: Comparable[Any]
    exact: Comparable[Any]
    stored: Mapping[str, Array]
    tolerances: Mapping[str, float]
    options: ValidateOptions
    integers: str = ""

    @property
    def comparisons(self) -> dict[Comparison, Comparable[Any]]:
        """The runners whose lowering is judged, against a reference that holds ``stored``."""
        if not self.stored:
            return {Comparison.SOURCE: self.runner}
        return {Comparison.STORED: self.exact} | ({} if self.exact is self.runner else {Comparison.DRIFT: self.runner})


def validate(
    artifact: Artifact,
    runner: Inspectable[Any],
    exact: Inspectable[Any],
    *,
    checkpoint: Path,
    options: ValidateOptions,
    progress: Progress,
) -> Report:
    """Compare an artifact with the PyTorch reference on ``checkpoint``, which must be what it was built from.

    ``runner`` and ``exact`` are those of Validation.

    Raises:
        H1ExportError: tolerances for metrics that do not exist, or a checkpoint that cannot be loaded.
    """
    found = validated(artifact, runner, exact, checkpoint=checkpoint, options=options, progress=progress)
    return Report(subject_facts(artifact.manifest, runner), environment_facts(), tuple(in_order(found)))


def validated(
    artifact: Artifact,
    runner: Inspectable[Any],
    exact: Inspectable[Any],
    *,
    checkpoint: Path,
    options: ValidateOptions,
    progress: Progress,
) -> Iterator[Row]:
    """Yield the rows of ``validate``, whose arguments these are, as soon as each is found.

    Raises:
        H1ExportError: as in ``validate``.
    """
    tolerances = defaults.tolerances_of(
        artifact.manifest,
        runner.provenance.float32,
        exact.provenance.float32,
        scale_rounding=runner.provenance.scale_rounding,
        chosen=options.tolerances,
    )
    stored = runner.stored_weights()
    integers = []
    scaling = AwqScales.load(artifact.folder)
    store = ScaledStore(WeightStore.open(checkpoint, runner.config, adapters=options.adapters), scaling, SILENT)
    if stored:
        progress.stage("stored weights")
        rounding = runner.provenance.scale_rounding
        integers.append(_weights_row(artifact, stored, store, rounding=rounding, tolerances=tolerances))
        yield from integers
    floats = runner.stored_floats() if stored and isinstance(runner, StoresRoundedFloats) else {}
    scaled = {
        name: store.rows(name, 0, store.shape(name)[0]) for name in scaling.tensors - stored.keys() - floats.keys()
    }
    held = {**stored, **floats, **scaled} if floats or scaled else stored
    integers_name = integers_of(artifact.manifest)
    validation = Validation(runner, exact, held, tolerances=tolerances, options=options, integers=integers_name)
    reference = Reference(checkpoint, options.adapters)
    yield from published_rows(runner, reference, weight_files(checkpoint, runner.config), tolerances=tolerances)
    yield from _rows(validation, reference, progress)
    if options.bisect:
        yield from map(integers_row, integers)


def judge(
    runner: Comparable[Any],
    checkpoint: Path,
    options: ValidateOptions = ValidateOptions(),
    *,
    progress: Progress = SILENT,
) -> Report:
    """Compare any Runner with the PyTorch reference on ``checkpoint``, as ``validate`` does without quantisation.

    Raises:
        H1ExportError: tolerances for metrics that do not exist, or a checkpoint that cannot be loaded.
    """
    float32 = runner.provenance.float32
    tolerances = defaults.tolerances_for("none", "rtn", float32, exact=float32, chosen=options.tolerances)
    validation = Validation(runner, runner, {}, tolerances=tolerances, options=options)
    rows = in_order(_rows(validation, Reference(checkpoint), progress))
    return Report(runner_facts(runner), environment_facts(), tuple(rows))


@dataclass(frozen=True)
class Outputs:
    """A runner's outputs in every case, and its greedy texts; ``no_texts`` says why there are none, or is empty."""

    runs: list[Run]
    texts: list[Continuation]
    no_texts: str

    @classmethod
    def of(cls, runner: Comparable[Any], options: ValidateOptions) -> Outputs:
        """Run every case and every prompt with ``runner``."""
        starts = prompts(options.text.ids, options.prompts, options.seed)
        no_texts = why_no_texts(runner, starts)
        texts = [] if no_texts else list(continuations(runner, starts))
        return cls(list(run_cases(runner, options.seed, options.quick)), texts, no_texts)

    def greedy(self, comparison: Comparison, reference: Reference) -> Row:
        if self.no_texts:
            return Row(CheckKind.GREEDY_TEXT, comparison, note=self.no_texts)
        return greedy_agreement_row(comparison, self.texts, reference)


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of a validation in a report's order, in which the cases of the lowering precede the others'.

    They come last, because the reference is changed for them.
    """
    found = list(rows)
    lowering = [row for row in found if _lowers(row)]
    others = [row for row in found if not _lowers(row)]
    first = next((at for at, row in enumerate(others) if row.kind in AFTER_LOWERING), len(others))
    return [*others[:first], *sorted(lowering, key=lambda row: LOWERING.index(row.comparison)), *others[first:]]


def _lowers(row: Row) -> bool:
    return row.kind is CheckKind.CASE and row.comparison in LOWERING


def _rows(validation: Validation, reference: Reference, progress: Progress) -> Iterator[Row]:
    """Run all checks, and yield their rows; the row of the stored integers is not among them.

    The reference holds the checkpoint's weights first, and the stored ones (``validation.stored``) after that.
    """
    runner = validation.runner
    options = validation.options
    tolerances = validation.tolerances
    progress.stage("artifact")
    shipped = Outputs.of(runner, options)
    judged = {
        comparison: shipped if judged_runner is runner else Outputs.of(judged_runner, options)
        for comparison, judged_runner in validation.comparisons.items()
    }
    magnitudes = runner.magnitudes() if isinstance(runner, TracksMagnitudes) else {}
    if magnitudes:
        yield _fp16_row(magnitudes, tolerances)
    progress.stage("reference")
    for run in shipped.runs:
        yield from case_rows([JudgedRun(Comparison.SOURCE, run, tolerances)], reference, runner.config)
    progress.stage("text")
    (text,) = text_rows([runner], reference, options.text, tolerances=[tolerances])
    greedy = shipped.greedy(Comparison.SOURCE, reference)
    yield from (text, greedy)
    if validation.integers:
        yield cost_row(validation.integers, text, greedy, tokens=len(options.text.ids), tolerances=tolerances)
    progress.stage("latency")
    yield from _latency_rows(runner, reference, options, tolerances=tolerances)
    if validation.stored:
        progress.stage("reference on the stored weights")
        reference.hold(validation.stored)
        for runs in zip(*(outputs.runs for outputs in judged.values()), strict=True):
            compared = [JudgedRun(comparison, run, tolerances) for comparison, run in zip(judged, runs, strict=True)]
            yield from case_rows(compared, reference, runner.config)
        yield from (outputs.greedy(comparison, reference) for comparison, outputs in judged.items())
    if options.contexts:
        progress.stage("long contexts")
        yield from context_rows(
            validation.comparisons, reference, options.contexts, tolerances=tolerances, seed=options.seed
        )
        yield from cost_rows(runner, options.contexts, seed=options.seed)
    if options.bisect:
        progress.stage("layer by layer")
        comparison = next(iter(validation.comparisons))
        tolerance = tolerances[f"{comparison}.states"]
        yield from bisect(validation.exact, reference, comparison, tolerance=tolerance, seed=options.seed)


def _weights_row(
    artifact: Artifact,
    stored: Mapping[str, Array],
    store: WeightStore,
    *,
    rounding: float,
    tolerances: Mapping[str, float],
) -> Row:
    errors = weight_errors(stored, artifact.manifest.weights, store, rounding=rounding)
    metrics = {"steps": defaults.STEPS_METRIC, "group": defaults.GROUP_METRIC}
    chosen = {name: tolerances[metric] for name, metric in metrics.items() if metric in tolerances}
    (judged,) = chosen
    details = {tensor: figures[judged] for tensor, figures in errors.items()}
    worst = max(details, key=details.__getitem__)
    return Row(
        CheckKind.STORED_INTEGERS,
        Comparison.SOURCE,
        figures={name: max(found[name] for found in errors.values()) for name in errors[worst]},
        tolerances=chosen,
        note=f"{len(errors)} tensors, worst {worst}",
        details=details,
    )


def _fp16_row(magnitudes: Mapping[str, float], tolerances: Mapping[str, float]) -> Row:
    """Return how near the activations of all cases came to the largest fp16 number."""
    worst = max(magnitudes, key=lambda op: float(np.nan_to_num(magnitudes[op], nan=np.inf)))
    return Row(
        CheckKind.FP16_RANGE,
        Comparison.FP16_LIMIT,
        figures={"largest": magnitudes[worst], "share": magnitudes[worst] / FP16_MAX},
        tolerances={"share": tolerances[defaults.FP16_METRIC]},
        note=f"{len(magnitudes)} kinds of op, worst {worst}",
        details=magnitudes,
    )


def _latency_rows(
    runner: Runner[Any], reference: Reference, options: ValidateOptions, *, tolerances: Mapping[str, float]
) -> list[Row]:
    if reason := _no_latency(runner, options):
        return [Row(CheckKind.LATENCY, Comparison.SOURCE, note=reason)]
    prompt = np.random.default_rng(options.seed).integers(0, runner.config.vocab_size, PREFILL_TOKENS, dtype=np.int64)
    note = f"median of {options.pairs} interleaved pairs, PyTorch on {torch.get_num_threads()} threads"
    measured = measure(runner, reference, prompt, pairs=options.pairs)
    return [
        _latency_row(phase, latency, tolerances[f"{defaults.LATENCY_PREFIX}.{phase}"], note=note)
        for phase, latency in measured.items()
    ]


def _latency_row(phase: Phase, latency: Latency, tolerance: float, *, note: str) -> Row:
    """Return the row of a phase; where the timings scatter around the tolerance, it is not judged."""
    undecided = latency.exceeds(tolerance) is None
    scattered = (
        f"; not judged: the pairs scatter around {tolerance:g}, which a quiet machine or more pairs would settle"
    )
    return Row(
        CheckKind.LATENCY,
        Comparison.SOURCE,
        phase=phase,
        figures={"artifact_s": latency.artifact, "reference_s": latency.reference, "ratio": latency.ratio},
        tolerances={} if undecided else {"ratio": tolerance},
        note=note + (scattered if undecided else ""),
    )


def _no_latency(runner: Runner[Any], options: ValidateOptions) -> str:
    """Return why latency cannot be measured; empty where it can."""
    if not options.pairs:
        return "not requested"
    if runner.provenance.emulated:
        return f"computed by {runner.provenance.kernels}: its speed says nothing"
    if (room := runner.limits.max_context) is not None and room < (needed := tokens_needed(options.pairs)):
        return f"{needed} tokens do not fit into {room}"
    return ""
