"""What a person sees in a terminal: progress bars and tables."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, TextIO, cast

from rich.box import SIMPLE
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from h1export.cli.output import Sheet, cell, cell_lines
from h1export.cli.streams import guarded
from h1export.errors import printable
from h1export.report import labels
from h1export.report.checks import CheckKind, Comparison, Phase
from h1export.report.report import AS_FIRST, KL, OUTPUT_FIGURES, SPEED, TENSORS, Report, Row, Verdict
from h1export.validate.speed import gate_checks

if TYPE_CHECKING:  # tables are drawn without loading what measures
    from h1export.commands.plan import Plan
    from h1export.report.stored_report import JudgedArtifact
    from h1export.validate.speed.bench import BenchReport
    from h1export.validate.speed.regression import GateReport
    from h1export.validate.speed.statistics import Estimate

STYLES = {
    Verdict.PASS: "green",
    Verdict.FAIL: "bold red",
    Verdict.INCONCLUSIVE: "yellow",
    Verdict.INFO: "cyan",
    Verdict.NOT_APPLICABLE: "dim",
}


class ProgressBars:
    """A Progress that rich draws: the stage, its bytes, the time."""

    def __init__(self, quiet: bool) -> None:
        console = Console(file=cast("TextIO", guarded(sys.stderr, False)))
        columns = (
            SpinnerColumn("line" if console.options.ascii_only else "dots"),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True)
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressBars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, name: str, total_bytes: int = 0) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(printable(name), total=total_bytes or None)

    def advance(self, nbytes: int) -> None:
        if self._task is not None:
            self._progress.advance(self._task, nbytes)


FINE = ("artifact", "reference", "ratio", "top1", "top5")  # figures that are shown with four digits
STANDARD_ERROR = "_se"  # the suffix of figures that are standard errors, see perplexity.text_figures


def report_tables(report: Report) -> list[Sheet]:
    """Return a table of the rows that compare logits and states, and one of all others."""
    cases = Table("case", "against", *OUTPUT_FIGURES, "verdict", box=SIMPLE)
    others = Table("check", "figures", "verdict", box=SIMPLE)
    for row in report.rows:
        verdict = cell(row.verdict, STYLES[row.verdict])
        check = cell(labels.check_label(row))
        if row.compares_outputs:
            cells = (_figure(row, name) for name in OUTPUT_FIGURES)
            cases.add_row(check, cell(labels.comparison_label(row)), *cells, verdict)
        else:
            shown = [name for name in row.figures if not name.endswith(STANDARD_ERROR)]
            figures = Text("  ").join(
                Text.assemble(cell(name), " ", _figure(row, name), _error(row, name), _tolerance(row, name))
                for name in shown
            )
            lines = [figures] if shown else []
            others.add_row(check, cell_lines([*lines, cell(row.note, "dim")] if row.note else lines), verdict)
    return [Sheet(cases, notes=(_tolerances(report.rows),), prose=True), Sheet(others, prose=True)]


def _figure(row: Row, name: str) -> Text:
    value = f"{row.figures[name]:.4g}" if name in FINE else f"{row.figures[name]:.3g}"
    return cell(value, "" if row.keeps(name) else "bold red")


def _error(row: Row, name: str) -> str:
    return f" ± {row.figures[name + STANDARD_ERROR]:.2g}" if name + STANDARD_ERROR in row.figures else ""


def _tolerance(row: Row, name: str) -> Text:
    return cell(f" (tolerance {row.tolerances[name]:.4g})", "dim") if name in row.tolerances else Text()


def _tolerances(rows: Iterable[Row]) -> str:
    """Return the tolerances of logits and states, each once, by the names that --tolerance takes."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name in OUTPUT_FIGURES:
            if name in row.tolerances:
                found.setdefault(f"{row.comparison}.{name}", []).append(row.tolerances[name])
    # that of top1 depends on the number of tokens
    spans = {
        metric: dict.fromkeys(f"{value:.3g}" for value in (min(each), max(each))) for metric, each in found.items()
    }
    return "tolerances  " + "  ".join(f"{metric} {' to '.join(span)}" for metric, span in spans.items())


def comparison_tables(subjects: Sequence[JudgedArtifact]) -> list[Sheet]:
    """Return a table with a row for each artifact, and one of what keeps a figure from being there."""
    columns = (
        "",
        "artifact",
        "target",
        "weights",
        "bytes",
        "logits",
        "kl",
        "bits/byte",
        "top1",
        "decode/s",
        "prefill/s",
    )
    table = Table(*columns, "integers as 1", "verdict", box=SIMPLE)
    for number, one in enumerate(subjects, 1):
        scored = partial(one.figure, CheckKind.TEXT)
        timed = partial(one.figure, CheckKind.SPEED, SPEED, comparison=Comparison.ALONE)
        counted = partial(one.figure, CheckKind.SHARED_INTEGERS, comparison=Comparison.ALONE)
        figures = (
            decimal(one.nbytes),
            _short(one.worst(Comparison.SOURCE, "logits")),
            _short(scored(KL), scored(KL + STANDARD_ERROR)),
            _short(scored("artifact"), fine=True),
            _short(scored("top1"), fine=True),
            *(_short(timed(phase=phase), fine=True) for phase in (Phase.DECODE, Phase.PREFILL)),
            _count(counted(AS_FIRST), counted(TENSORS)),
        )
        manifest = one.artifact.manifest
        known = (number, one.artifact.folder, manifest.target, manifest.scheme["quant"])
        verdict = Verdict.PASS if one.report.passed else Verdict.FAIL
        table.add_row(*map(cell, (*known, *figures)), cell(verdict, STYLES[verdict]))
    reasons = dict.fromkeys(
        f"{number}, {labels.check_label(row)}: {row.note}"
        for number, one in enumerate(subjects, 1)
        for row in one.rows
        if row.verdict in {Verdict.NOT_APPLICABLE, Verdict.FAIL}
    )
    bits = subjects[0].figure(CheckKind.TEXT, "reference")
    notes = [f"bits per byte of PyTorch {bits:.4g}"] if bits is not None else []
    return [Sheet(table, notes=(*notes, *reasons), prose=True)]


def _short(value: float | None, error: float | None = None, *, fine: bool = False) -> str:
    if value is None:
        return "n/a"
    shown = f"{value:.4g}" if fine else f"{value:.3g}"
    return shown if error is None else f"{shown} ± {error:.1g}"


def _count(shared: float | None, tensors: float | None) -> str:
    if not tensors:
        return "none"
    return f"{tensors:.0f}" if shared is None else f"{shared:.0f} of {tensors:.0f}"


def bench_tables(report: BenchReport) -> list[Sheet]:
    """Return a table for each model that was measured, and one of the speeds of all."""
    tables = []
    for measured in report.measured:
        settings = [f"{name} {value}" for name, value in measured.built_as.items()]
        peaks = [f"{decimal(size)} with threads {threads}" for threads, size in measured.peak_bytes.items()]
        rows = {
            "built as": ", ".join(settings),
            "kernels": measured.kernels,
            "size": decimal(measured.weight_bytes),
            "peak memory": ", ".join(peaks),
        }
        tables.append(pairs_table(measured.folder, rows.items()))
    return [*tables, _speeds_table(report)]


def _speeds_table(report: BenchReport) -> Sheet:
    paired = len(report.measured) == 2
    columns = ("threads", "timing", "tokens/s", "interval", "read a step", "of bandwidth")
    table = Table(*(["of"] if paired else []), *columns, *(["ratio", "interval"] if paired else []), box=SIMPLE)
    for speed in report.speeds:
        decode = speed.step_bytes is not None
        read = [decimal(speed.step_bytes or 0), f"{speed.bandwidth_share:.0%}"] if decode else ["", ""]
        timing = gate_checks.timing_label(speed.timing)
        cells = [str(speed.threads), timing, *_estimate(speed.tokens_per_second), *read]
        first = [f"{speed.model + 1}"] if paired else []
        ratio = _estimate(speed.ratio) if speed.ratio else []
        table.add_row(*(cell(value) for value in (*first, *cells, *ratio)))
    lines = [f"medians of {report.options.repeats} interleaved rounds"]
    for threads, found in report.bandwidth.items():
        lines.append(
            f"read bandwidth {found.best / 1e9:.1f} GB/s with threads {threads}: the best of {found.reads} reads"
            + " and of the decode steps, which were faster" * (found.best > found.read)
        )
        if not found.is_quiet:
            lines.append(
                f"the machine was not quiet, or weights lie in a cache: the median of the reads with threads {threads} "
                f"is {found.typical / found.best:.0%} of the best"
            )
    return Sheet(table, notes=(*lines, *(f"left out: {reason}" for reason in report.left_out)), prose=True)


def _estimate(value: Estimate) -> list[str]:
    return [f"{value.median:.4g}", f"{value.low:.4g} to {value.high:.4g}"]


def gate_table(report: GateReport) -> Sheet:
    """Return a table of every check, with the verdict of all."""
    table = Table("check", "figure", "interval", "limit", "verdict", "note", box=SIMPLE)
    for check in report.checks:
        verdict = cell(check.verdict, STYLES[check.verdict])
        cells = (gate_checks.check_label(check), *_figures(check))
        table.add_row(*map(cell, cells), verdict, cell(check.note))
    note = f"{report.verdict}: {report.artifact}, timings relative to the baseline"
    return Sheet(table, notes=(note,), prose=True)


def _figures(check: gate_checks.Check) -> list[str]:
    if check.figure is None or check.limit is None:
        return ["", "", ""]
    if check.low is not None and check.high is not None:
        return [f"{check.figure:.3f}", f"{check.low:.3f} to {check.high:.3f}", f"{check.limit:.3g}"]
    return [f"{check.figure:,.0f}", "", f"{check.limit:,.0f}"]


def pairs_table(title: str, rows: Iterable[tuple[str, object]]) -> Sheet:
    """Return a table of names and values; no value is wrapped."""
    table = Table(Column(style="bold"), Column(), show_header=False)
    for name, value in rows:
        table.add_row(cell(name), cell_lines(_lines(value)) if isinstance(value, dict) else cell(value))
    return Sheet(table, title)


def _lines(values: dict[str, object]) -> list[str]:
    """Return one line an item; of I/O names, which repeat layer by layer, only the first layer's."""
    shown = [f"{name}  {value}" for name, value in values.items() if not re.search(r"\.[1-9]\d*\.", name)]
    return shown if len(shown) == len(values) else [*shown, f"and the same for every layer: {len(values)} in all"]


def _beside(plan: Plan) -> str:
    """What the time of a plan leaves out, in words."""
    return f"; beside what {plan.gpu} computes, which is not estimated" if plan.gpu else ""


def plan_table(plan: Plan) -> Sheet:
    """Return a table of a plan, sizes first."""
    fits = "enough" if plan.disk_free > plan.artifact_bytes + plan.scratch_bytes else "NOT ENOUGH"
    scratch = (
        f", {decimal(plan.scratch_bytes)} needed beside the artifact until it is done" if plan.scratch_bytes else ""
    )
    rows: list[tuple[str, object]] = [
        ("artifact", f"{decimal(plan.artifact_bytes)} from {decimal(plan.source_bytes)}"),
        ("disk", f"{decimal(plan.disk_free)} free: {fits}{scratch}"),
        ("peak memory", decimal(plan.peak_bytes)),
        ("time", f"about {plan.seconds:.0f} s, from lowering it and samples of the work here{_beside(plan)}"),
        *((f"states at {context} tokens", decimal(size)) for context, size in plan.state_bytes.items()),
        *((precision, f"{count} tensors") for precision, count in plan.by_precision().items()),
    ]
    return pairs_table(f"{plan.target}: {plan.out}", rows)


def presets_table(plan: Plan) -> Sheet:
    """Return a table of int4 without a preset, and with each."""
    models = list(dict.fromkeys(model for preset in plan.presets for model in preset.measured))
    table = Table(
        "preset", "matrices", "bits a weight", "expected KL", *(f"KL of {name}" for name in models), box=SIMPLE
    )
    for preset in plan.presets:
        expected = "not measured" if preset.expected is None else f"{preset.expected:.4f}"
        others = (f"{preset.measured[model]:.4f}" for model in models)
        cells = (preset.name, decimal(preset.nbytes), f"{preset.bits:.2f}", expected, *others)
        table.add_row(*map(cell, cells))
    notes = ["KL in nats a token, by GPTQ. Those of other models were measured; they say little about this one's size."]
    if plan.presets[0].expected is None:
        notes.append("for this model: h1export sensitivity MODEL --json > FILE, then plan --sensitivity FILE")
    else:
        notes.append("expected: the sum over the tensors that stay int4, each measured alone")
    return Sheet(table, notes=tuple(notes), prose=True)
