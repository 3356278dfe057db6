"""The checks of `h1export gate`: kinds, figures, and the names that tables show."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from h1export.report.checks import Phase
from h1export.report.report import Verdict

if TYPE_CHECKING:  # tables are drawn without loading what measures
    from h1export.validate.speed.worker import Timing


class GateCheckKind(StrEnum):
    """What is held against the baseline."""

    NODES = "nodes"
    """The nodes of every type of op in the graph ``Check.file``."""

    FILE_BYTES = "file bytes"
    """The size of every file."""

    STEP_BYTES = "step bytes"
    """The bytes that a decode step reads."""

    SPILLS = "kernel spills"
    """The bytes that GPU kernels store because registers run out."""

    MEMORY = "peak memory"
    """The bytes of memory at the peak."""

    TIMING = "timing"
    """The time of ``Check.timing`` by that of the reference, relative to the baseline."""

    MEASUREMENTS = "measurements"
    """Memory and all timings, where none can be measured."""


@dataclass(frozen=True)
class Check:
    """One figure and its limit; ``low`` and ``high`` are the interval of a figure that was measured and not counted."""

    kind: GateCheckKind
    verdict: Verdict
    _: KW_ONLY
    file: str = ""
    timing: Timing | None = None
    figure: float | None = None
    limit: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""


LABELS = {
    GateCheckKind.NODES: "nodes",
    GateCheckKind.FILE_BYTES: "file bytes",
    GateCheckKind.STEP_BYTES: "bytes a step reads",
    GateCheckKind.SPILLS: "kernel spills",
    GateCheckKind.MEMORY: "peak memory",
    GateCheckKind.MEASUREMENTS: "memory and timings",
}


def check_label(check: Check) -> str:
    """Return the name of a check, as tables show it."""
    if check.timing is not None:
        return timing_label(check.timing)
    return f"{LABELS[check.kind]} {check.file}".rstrip()


def timing_label(timing: Timing) -> str:
    """Return the name of a timing, as tables show it; ``Timing.key`` is the one that baselines keep."""
    text = f"decode at {timing.tokens}" if timing.phase is Phase.DECODE else f"prefill {timing.tokens}"
    return text if timing.batch == 1 else f"{text}, batch {timing.batch}"
