"""Swept: what a sweep found out about one of its cells, as its file has it, and which cells no other one beats."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from h1export import forms
from h1export.forms import Count
from h1export.report.report import Number
from h1export.writing import write_into

AGAIN = "remove it, and run `h1export sweep` again"
WHAT = "a cell's file of this h1export"
# figures, by which cells are compared
KL = "kl"
DECODE, PREFILL = "decode", "prefill"  # tokens a second


@dataclass(frozen=True)
class Swept:
    """One cell.

    Attributes:
        name: the name of the cell, which is that of its folder too.
        key: the sha256 of all that decides its figures.
        checkpoint: the checkpoint's name in the sweep.
        target: the runtime.
        precision: the precision of the weights.
        method: how integers were chosen.
        group_size: columns that share an int4 scale; 0 where the precision has none.
        identity: of the artifact; empty where there is none.
        nbytes: bytes of all its files.
        passed: whether every check of its validation passed.
        figures: name -> value.
        tasks: "TASK METRIC" of lm-eval -> value.
        note: what the reader should know.
        error: why it could not be made or judged; empty where it could.
    """

    name: str
    key: str
    _: KW_ONLY
    checkpoint: str
    target: str
    precision: str
    method: str = ""
    group_size: Count = 0
    identity: str = ""
    nbytes: Count = 0
    passed: bool = False
    figures: Mapping[str, float] = field(default_factory=dict)
    tasks: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    error: str = ""

    @property
    def verdict(self) -> str:
        """How it ended, in a word or two."""
        return "could not run" if self.error else "PASSED" if self.passed else "FAILED"

    def write(self, folder: Path) -> None:
        """Write its file into ``folder``, completely or not at all."""
        data = asdict(self)
        for name in ("figures", "tasks"):
            data[name] = {key: value if math.isfinite(value) else str(value) for key, value in data[name].items()}
        write_into(folder, self.file, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.name}.json"

    @classmethod
    def read(cls, path: Path) -> Swept:
        """Read what ``write`` wrote. Raises H1ExportError where it cannot be read, or is something else."""
        form = forms.read(path, _Stored, what=WHAT, next_step=AGAIN)
        found: dict[str, Any] = {**vars(form)}
        for name in ("figures", "tasks"):
            found[name] = {key: float(value) for key, value in found[name].items()}
        return cls(found.pop("name"), found.pop("key"), **found)


@dataclass(frozen=True)
class _Stored:
    """A Swept as its file has it."""

    name: Annotated[str, Meta(max_length=256)]
    key: forms.Sha256
    checkpoint: str
    target: str
    precision: str
    method: str
    group_size: Count
    identity: str
    nbytes: Count
    passed: bool
    figures: Mapping[str, Number]
    tasks: Mapping[str, Number]
    note: str
    error: str


def fronts(cells: Sequence[Swept]) -> set[str]:
    """Return the names of the cells that no other one of their checkpoint beats in size, speed and divergence.

    A cell beats another one where it is better in one of them and worse in none. A figure that is missing is worse than
    any; a cell that could not run or has failed its validation counts for nothing.
    """
    found: set[str] = set()
    for checkpoint in dict.fromkeys(cell.checkpoint for cell in cells):
        right = [cell for cell in cells if cell.checkpoint == checkpoint and cell.passed and not cell.error]
        costs = {cell.name: _costs(cell) for cell in right}
        found |= {name for name, own in costs.items() if not any(_beats(other, own) for other in costs.values())}
    return found


def _costs(cell: Swept) -> tuple[float, float, float]:
    """Return what should be small."""
    divergence = cell.figures.get(KL, math.inf)
    return cell.nbytes, -cell.figures.get(DECODE, -math.inf), math.inf if math.isnan(divergence) else divergence


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def staircase(points: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Yield those points (x, y) that have a smaller y than all with a smaller x, by x."""
    least = math.inf
    for x, y in sorted(points):
        if y < least:
            least = y
            yield x, y


def failed(cell: Swept, error: str) -> Swept:
    """Return the cell with an error in place of what was found."""
    return replace(cell, error=error, passed=False)
