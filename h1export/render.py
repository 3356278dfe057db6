"""What a person sees in a terminal: progress bars and tables."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from h1export.core.report import Report, Row, Verdict

STYLES = {Verdict.PASS: "green", Verdict.FAIL: "bold red", Verdict.INFO: "cyan", Verdict.NOT_APPLICABLE: "dim"}


class Bars:
    """A core.progress.Progress drawn by rich: the stage, its bytes, the time."""

    def __init__(self, quiet: bool) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True)
        self._task: TaskID | None = None

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def stage(self, name: str, total_bytes: int = 0) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=total_bytes or None)

    def advance(self, nbytes: int) -> None:
        if self._task is not None:
            self._progress.advance(self._task, nbytes)


def report_table(report: Report) -> Table:
    """One line a row, figures with their limits where they have one."""
    table = Table(title=f"{report.subject['target']}  {report.subject['scheme']['quant']}  accuracy of the export", title_justify="left")
    for name, justify in (("check", "left"), ("against", "left"), ("figures (limit)", "left"), ("verdict", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in report.rows:
        table.add_row(row.check, row.against, _figures(row), f"[{STYLES[row.verdict]}]{row.verdict}[/]")
    return table


def _figures(row: Row) -> str:
    if not row.figures:
        return f"[dim]{row.note}[/]"
    shown = []
    for name, value in row.figures.items():
        limit = f" ({row.limits[name]:.3g})" if name in row.limits else ""
        shown.append(f"{name} {value:.3g}{limit}")
    return "  ".join(shown)


def pairs_table(title: str, rows: Iterable[tuple[str, object]]) -> Table:
    """A table of names and values."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows:
        table.add_row(name, str(value))
    return table


def human_bytes(count: float) -> str:
    """1536 -> "1.5 KB", in powers of 1000 as disks and file listings count."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
