"""Write the page of a sweep: for each checkpoint a table of its cells, and plots of size and speed over divergence."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from h1export.report import charts
from h1export.report.swept import DECODE, KL, PREFILL, Swept, fronts, staircase
from h1export.report.template import template

TEMPLATE = "sweep.html.jinja"
LEAST_KL = 1e-9  # nats; what is less is drawn there
MEGABYTE = 1e6
# a figure's name -> its column; those of tasks follow
COLUMNS: Mapping[str, str] = {
    KL: "KL, nats",
    "bits_per_byte": "bits per byte",
    DECODE: "decode, tokens/s",
    PREFILL: "prefill, tokens/s",
}


def sweep_page(cells: Sequence[Swept]) -> str:
    """Return the HTML of one page about the cells, which needs no other file. Every text of theirs is escaped.

    Raises:
        H1ExportError: matplotlib is not installed.
    """
    best = fronts(cells)
    targets = list(dict.fromkeys(cell.target for cell in cells))
    names = dict.fromkeys(cell.checkpoint for cell in cells)
    sections = [
        _section(place, [cell for cell in cells if cell.checkpoint == name], best, targets=targets)
        for place, name in enumerate(names)
    ]
    verdicts = Counter(cell.verdict for cell in cells)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()) or "no cells"
    return template(TEMPLATE).render(sections=sections, targets=targets, counts=counts)


def columns(cells: Sequence[Swept]) -> dict[str, Callable[[Swept], float | None]]:
    """Return the columns of numbers that any of the cells has: title -> what gives the number."""
    found: dict[str, Callable[[Swept], float | None]] = {"bytes": lambda cell: cell.nbytes or None}
    for name, title in COLUMNS.items():
        if any(name in cell.figures for cell in cells):
            found[title] = lambda cell, name=name: cell.figures.get(name)  # type: ignore[misc]
    for name in dict.fromkeys(task for cell in cells for task in cell.tasks):
        found[name] = lambda cell, name=name: cell.tasks.get(name)  # type: ignore[misc]
    return found


def _section(place: int, cells: Sequence[Swept], best: set[str], *, targets: Sequence[str]) -> dict[str, Any]:
    """Return what the page has about one checkpoint, the ``place``-th one."""
    numbers = columns(cells)
    size = ("Size and divergence", "MB", lambda cell: cell.nbytes / MEGABYTE if cell.nbytes else None)
    time = ("Time and divergence", "ms of a token in decode", _milliseconds)
    return {
        "checkpoint": cells[0].checkpoint,
        "columns": list(numbers),
        "rows": [
            {
                "number": number,
                "cell": cell,
                "is_front": cell.name in best,
                "numbers": [value(cell) for value in numbers.values()],
            }
            for number, cell in enumerate(cells, 1)
        ],
        "charts": [
            chart
            for kind, (title, label, of) in enumerate((size, time))
            if (chart := _chart(f"sweep-{place}-{kind}", title, label, of=of, cells=cells, targets=targets))
        ],
    }


def _milliseconds(cell: Swept) -> float | None:
    return 1000 / cell.figures[DECODE] if cell.figures.get(DECODE) else None


def _chart(
    name: str,
    title: str,
    label: str,
    *,
    of: Callable[[Swept], float | None],
    cells: Sequence[Swept],
    targets: Sequence[str],
) -> dict[str, Any] | None:
    """Return a plot whose points have the numbers of the table; None where no cell has both figures."""
    marks = [
        charts.Mark(x, max(y, LEAST_KL), targets.index(cell.target), str(number))
        for number, cell in enumerate(cells, 1)
        if (x := of(cell)) is not None and math.isfinite(y := cell.figures.get(KL, math.nan)) and not cell.error
    ]
    if not marks:
        return None
    front = list(staircase([(mark.x, mark.y) for mark in marks]))
    svg = charts.scatter(name, label, "KL, nats", marks=marks, front=front)
    return {"title": title, "svg": Markup(svg), "caption": "the dashed line joins the best of each size or time"}
