"""Small charts as SVG for a page: matplotlib draws them, and the page's style gives colours and fonts, light or dark.

Every chart is as wide as a phone, so that it is never scaled down there. ``Series`` beyond COLOURS share colours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from h1export.errors import H1ExportError
from h1export.report.histogram import PER_DECADE, Histogram

COLOURS = 8
SERIES = tuple(f"#a1b2c{index}" for index in range(COLOURS))  # stand for the page's --series-N
# and these for --ink and --grid
INK = "#a1b2ca"
GRID = "#a1b2cb"
VARIABLES = {colour: f"var(--series-{index})" for index, colour in enumerate(SERIES)} | {
    INK: "var(--ink)",
    GRID: "var(--grid)",
}
TICKS = 6  # at most
# inches of 72 SVG units
WIDTH = 3.4
HEIGHT = 2.3
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "h1export",
    "text.parse_math": False,  # names may hold a dollar sign
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "axes.edgecolor": GRID,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True)
class Series:
    """The points of one line.

    Attributes:
        artifact: the index of the artifact, which chooses the colour.
        x: places of the points on the x axis, such as layers or tokens.
        y: their values.
        dashed: distinguishes two lines of one artifact.
    """

    artifact: int
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def lines(name: str, x_label: str, y_label: str, *, series: Sequence[Series], log: bool = True) -> str:
    """Return the SVG of lines through points, with ticks at the points.

    ``log`` makes the y axis logarithmic, where values that are not positive and finite are left out.
    """

    def draw(axes: Any) -> None:
        for one in series:
            style = "--" if one.dashed else "-"
            shown = [y if not log or 0 < y < math.inf else math.nan for y in one.y]
            axes.plot(
                one.x, shown, style, color=SERIES[one.artifact % COLOURS], marker="o", markersize=2.5, linewidth=1.2
            )
        places = sorted({x for one in series for x in one.x})
        if places[-1] > TICKS * len(places):  # contexts, which grow by factors
            axes.set_xscale("log")
        every = -(-len(places) // TICKS)
        axes.set_xticks(places[::every], [f"{x:g}" for x in places[::every]])
        axes.xaxis.minorticks_off()
        if log:
            _decades(axes, "y", [y for one in series for y in one.y])
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return _svg(name, draw)


def histograms(name: str, x_label: str, found: Mapping[int, Histogram]) -> str:
    """Return the SVG of shares of positions by order of magnitude; ``found`` is by the artifact's index."""

    def draw(axes: Any) -> None:
        for artifact, one in found.items():
            edges = [10 ** ((one.first + index) / PER_DECADE) for index in range(len(one.counts) + 1)]
            shares = [count / sum(one.counts) for count in one.counts]
            colour = SERIES[artifact % COLOURS]
            axes.stairs(shares, edges, color=colour, linewidth=1.2)
            axes.stairs(shares, edges, fill=True, color=colour, alpha=0.2)
        _decades(
            axes,
            "x",
            [
                10 ** (place / PER_DECADE)
                for one in found.values()
                for place in (one.first, one.first + len(one.counts))
            ],
        )
        axes.set_xlabel(x_label)
        axes.set_ylabel("share of positions")

    return _svg(name, draw)


def bars(name: str, x_label: str, labels: Sequence[str], *, values: Mapping[int, Sequence[float]]) -> str:
    """Return the SVG of bars, one for each label and artifact; ``values`` has the lengths by the artifact's index."""

    def draw(axes: Any) -> None:
        height = 0.8 / len(values)
        for row, (artifact, lengths) in enumerate(values.items()):
            places = [place + (row + 0.5) * height - 0.4 for place in range(len(labels))]
            axes.barh(places, lengths, height * 0.9, color=SERIES[artifact % COLOURS])
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x_label)

    return _svg(name, draw)


@dataclass(frozen=True)
class Mark:
    """A point of a scatter.

    Attributes:
        colour: the index of its colour.
        label: a short text beside it.
    """

    x: float
    y: float
    colour: int
    label: str


def scatter(
    name: str, x_label: str, y_label: str, *, marks: Sequence[Mark], front: Sequence[tuple[float, float]]
) -> str:
    """Return the SVG of labelled points and of the steps through ``front``; the y axis is logarithmic."""

    def draw(axes: Any) -> None:
        for mark in marks:
            axes.plot([mark.x], [mark.y], "o", color=SERIES[mark.colour % COLOURS], markersize=4)
            axes.annotate(mark.label, (mark.x, mark.y), xytext=(3, 3), textcoords="offset points", fontsize=6)
        axes.plot(*zip(*front, strict=True), "--", color=INK, linewidth=0.8, drawstyle="steps-post")
        _decades(axes, "y", [mark.y for mark in marks])
        axes.margins(x=0.15)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return _svg(name, draw)


def _decades(axes: Any, which: str, values: Sequence[float]) -> None:
    """Make the axis ``which`` logarithmic, of whole decades, few of which have labels."""
    shown = [math.log10(value) for value in values if 0 < value < math.inf] or [0.0]
    low = math.floor(min(shown))
    high = math.ceil(max(shown))
    exponents = range(low, max(high, low + 1) + 1)
    axes.set(**{f"{which}scale": "log", f"{which}lim": (10.0**low, 10.0 ** exponents[-1])})
    axis = getattr(axes, f"{which}axis")
    axis.set_ticks([10.0**exponent for exponent in exponents[:: -(-len(exponents) // TICKS)]])
    axis.set_major_formatter("{x:.0e}")
    axis.minorticks_off()


def _svg(name: str, draw: Callable[[Any], None]) -> str:
    """Return the SVG for a page: without a file header, and with ``name`` in its ids, because a page has several."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise H1ExportError("matplotlib", "is not installed", "pip install 'h1export[report]'") from None
    with mpl.rc_context({**mpl.rcParamsDefault, **SETTINGS}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        draw(figure.add_subplot())
        out = StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    return re.sub("|".join(VARIABLES), lambda match: VARIABLES[match[0]], text)
