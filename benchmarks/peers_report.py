"""The results of peers.py: the table, the JSON, the plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from h1export.report.checks import Phase
from h1export.validate.speed.memory_traffic import Bandwidth
from h1export.validate.speed.statistics import Estimate
from h1export.validate.speed.worker import Timing


@dataclass(frozen=True)
class Facts:
    """A peer before it runs; None means not measured. ``export_peak_bytes`` is anonymous memory."""

    name: str
    file_bytes: int | None = None
    export_seconds: float | None = None
    export_peak_bytes: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """One timing of one peer at one thread count.

    Attributes:
        speed: tokens per second; None where ``note`` has the reason.
        bandwidth_share: of what a decode step has to read, at this speed, of the fastest read of memory.
        to_llama: ratio to the fastest GGUF file at this timing, round by round.
    """

    peer: str
    threads: int
    timing: Timing
    speed: Estimate | None = None
    bandwidth_share: float | None = None
    to_llama: Estimate | None = None
    samples: tuple[float, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Results:
    """A whole run.

    ``peak_bytes`` has (peer, threads, bytes) while it ran, and ``bandwidth`` what memory delivers by thread count.
    """

    checkpoint: str
    machine: dict[str, Any]
    rounds: int
    bandwidth: dict[int, Bandwidth]
    kernels: dict[str, str]
    peers: tuple[Facts, ...]
    peak_bytes: tuple[tuple[str, int, int], ...]
    cells: tuple[Cell, ...]


def show(results: Results) -> None:
    """Print what the peers are, and their speeds at every thread count."""
    peers = Table("peer", "kernels", "files", "export", "its memory", "memory, by threads", box=SIMPLE)
    for facts in results.peers:
        peaks = ", ".join(
            f"{decimal(size)} ({threads})" for peer, threads, size in results.peak_bytes if peer == facts.name
        )
        export = [f"{facts.export_seconds:.0f} s" if facts.export_seconds else "", _bytes(facts.export_peak_bytes)]
        peers.add_row(
            facts.name, results.kernels.get(facts.name, ""), _bytes(facts.file_bytes), *export, peaks or facts.note
        )
    console = Console()
    console.print(peers)
    for threads, bandwidth in results.bandwidth.items():
        console.print(_speeds(results, threads, bandwidth))


def _bytes(count: int | None) -> str:
    return "" if count is None else decimal(count)


def _speeds(results: Results, threads: int, bandwidth: Bandwidth) -> Table:
    cells = [cell for cell in results.cells if cell.threads == threads]
    timings = list(dict.fromkeys(cell.timing for cell in cells))
    table = Table("tokens/s", *(_heading(timing) for timing in timings), title=f"threads: {threads}", box=SIMPLE)
    for facts in results.peers:
        table.add_row(facts.name, *(_cell(cell) for cell in cells if cell.peer == facts.name))
    table.caption = (
        f"medians of {results.rounds} interleaved rounds, plus or minus half the 95 % interval; "
        "x: relative to llama.cpp's fastest; "
        f"%: of the fastest read of memory, {bandwidth.best / 1e9:.1f} GB/s; batch 1 where nothing else is said"
    )
    if not bandwidth.is_quiet:
        table.caption += f"; the machine was not quiet: the median read {bandwidth.typical / 1e9:.1f} GB/s"
    return table


def _heading(timing: Timing) -> str:
    rows = f", {timing.batch} rows" if timing.batch > 1 else ""
    return f"{timing.phase} {timing.tokens}{rows}"


def _cell(cell: Cell) -> str:
    if cell.speed is None:
        return f"[dim]{cell.note}[/]"
    lines = [f"{cell.speed.median:.4g} ±{cell.speed.spread:.0%}"]
    if cell.to_llama is not None:
        lines.append(f"x {cell.to_llama.median:.2f} ({cell.to_llama.low:.2f} to {cell.to_llama.high:.2f})")
    if cell.bandwidth_share is not None:
        lines.append(f"{cell.bandwidth_share:.0%}")
    return "\n".join(lines)


def plot(results: Results, folder: Path) -> list[Path]:
    """One figure a thread count: speeds in decode and in prefill, with their intervals."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for threads in results.bandwidth:
        cells = [cell for cell in results.cells if cell.threads == threads and cell.speed is not None]
        figure = Figure(figsize=(15, 4), layout="constrained")
        peers = list(dict.fromkeys(cell.peer for cell in cells))
        for axes, panel in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
            _bars(axes, panel, [cell for cell in cells if panel.has(cell.timing)], peers=peers)
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small"
        )
        figure.suptitle(f"{results.checkpoint}, threads: {threads}")
        files.append(folder / f"peers-{threads}-threads.png")
        figure.savefig(files[-1], dpi=120)
    return files


@dataclass(frozen=True)
class Panel:
    """One part of a figure: which timings it has, where each lies on the x axis, and what the axes say."""

    has: Callable[[Timing], bool]
    place: Callable[[Timing], int]
    x_label: str
    y_label: str


PANELS = (
    Panel(
        lambda timing: timing.phase is Phase.DECODE and timing.batch == 1,
        lambda timing: timing.tokens,
        "tokens before",
        "decode, tokens/s",
    ),
    Panel(
        lambda timing: timing.phase is Phase.PREFILL,
        lambda timing: timing.tokens,
        "tokens of the prompt",
        "prefill, tokens/s",
    ),
    Panel(
        lambda timing: timing.phase is Phase.DECODE and timing.tokens == 0,
        lambda timing: timing.batch,
        "rows",
        "decode of all rows, tokens/s",
    ),
)


def _bars(axes: Any, panel: Panel, cells: Sequence[Cell], *, peers: Sequence[str]) -> None:
    places_of = sorted({panel.place(cell.timing) for cell in cells})
    width = 0.8 / len(peers)
    for index, peer in enumerate(peers):
        found = [
            (places_of.index(panel.place(cell.timing)), cell.speed)
            for cell in cells
            if cell.peer == peer and cell.speed is not None
        ]
        places = [place + (index - len(peers) / 2 + 0.5) * width for place, _ in found]
        errors = [[speed.median - speed.low for _, speed in found], [speed.high - speed.median for _, speed in found]]
        axes.bar(
            places,
            [speed.median for _, speed in found],
            width,
            yerr=errors,
            label=peer,
            color=f"C{index}",
            error_kw={"linewidth": 0.8},
        )
    axes.set_xticks(range(len(places_of)), [str(place) for place in places_of])
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
