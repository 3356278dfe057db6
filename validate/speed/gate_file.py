"""Read gates.toml, which people write, and the baseline beside it, which `h1export gate --write-baseline` writes.

See docs/gates.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, get_args

from h1export import forms
from h1export.artifact.manifest import Manifest
from h1export.errors import H1ExportError
from h1export.forms import Count
from h1export.model.config_reader import shown
from h1export.quantize.choices import QuantName
from h1export.report.checks import Phase
from h1export.validate.speed.decision import FIRST
from h1export.validate.speed.statistics import Estimate
from h1export.validate.speed.worker import Timing
from h1export.writing import write_file


class Clock(StrEnum):
    """Which time counts: the processor time of the process, whatever else runs on the machine, or the wall clock."""

    CPU = "cpu"
    WALL = "wall"


@dataclass(frozen=True)
class Limit:
    """``timing`` may take ``slowdown`` times as long as in the baseline, both relative to the reference."""

    timing: Timing
    slowdown: float = 1.15


@dataclass(frozen=True)
class Gate:
    """The limits of artifacts of one target and quantisation. Factors apply to the baseline's figures.

    Attributes:
        timings: the timings that must not get slower.
        threads: thread count of artifact and reference.
        clock: CPU is right for one thread only, because threads that wait for each other spin.
        pairs: timings of artifact and reference at most, after which a verdict is inconclusive.
        bytes: factor of the size of every file.
        step_bytes: factor of the bytes that a decode step reads.
        nodes: factor of the number of nodes of every type of op.
        memory: factor of the peak memory.
    """

    target: str
    quant: QuantName
    timings: tuple[Limit, ...] = ()
    threads: int = 1
    clock: Clock = Clock.CPU
    pairs: int = 128
    bytes: float = 1.0
    step_bytes: float = 1.0
    nodes: float = 1.0
    memory: float = 1.1


@dataclass(frozen=True)
class Ratio:
    """The artifact's time by the reference's, timed side by side: median and interval over ``pairs``."""

    estimate: Estimate
    pairs: int


@dataclass(frozen=True)
class Baseline:
    """The figures of an artifact when its gates were set.

    Attributes:
        model: sha256 of the configuration and the options, see model_of.
        nodes: graph -> op type -> how many.
        files: name -> bytes.
        step_bytes: timing -> bytes.
        peak_bytes: peak memory; 0: not measured.
        ratios: kind of CPU, and GPU -> timing -> ratio. Kinds differ in vector instructions, so ratios of one say
            little about another.
        spills: GPU kernel and architecture -> bytes a thread stores because registers run out.
    """

    model: str
    nodes: Mapping[str, Mapping[str, Count]]
    files: Mapping[str, Count]
    step_bytes: Mapping[str, Count]
    peak_bytes: Count = 0
    ratios: Mapping[str, Mapping[str, Ratio]] = field(default_factory=dict)
    spills: Mapping[str, Count] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredBaselines:
    """The file of baselines: "target quant" -> the figures."""

    format: Literal[1]
    gates: Mapping[str, Baseline]


def model_of(manifest: Manifest) -> str:
    """Return a hash; artifacts with the same one differ in nothing but the values of weights."""
    return hashlib.sha256(
        json.dumps([manifest.config, manifest.options], sort_keys=True, default=str).encode()
    ).hexdigest()


def read_gates(path: Path) -> tuple[tuple[Gate, ...], Path]:
    """Return the gates in ``path`` and the path of their baseline.

    Raises:
        H1ExportError: no such file, not TOML, unknown or missing keys, values of a wrong type or out of range.
    """
    try:
        data = forms.from_toml(forms.content(path, "write one as docs/gates.md says"))
    except forms.FormError as error:
        raise H1ExportError(path, f"is not TOML ({error})", "correct it") from None
    keys = _known(path, "", data, types={"baseline": str, "gate": list})
    gates = tuple(_gate(path, number, table) for number, table in enumerate(keys.get("gate", []), 1))
    named = [(gate.target, gate.quant) for gate in gates]
    for name in named:
        if named.count(name) > 1:
            raise H1ExportError(
                path, f"has two gates for {' '.join(name)}", "keep one; another model has a file of its own"
            )
    return gates, path.parent / keys.get("baseline", f"{path.stem}.baseline.json")


def _gate(path: Path, number: int, table: Any) -> Gate:
    where = f"gate {number}"
    types = {"target": str, "quant": str, "threads": int, "clock": str, "pairs": int, "timing": list}
    keys = _known(path, where, table, types=types | dict.fromkeys(("bytes", "step_bytes", "nodes", "memory"), float))
    for name, choices in (("quant", get_args(QuantName)), ("clock", tuple(Clock))):
        if keys.get(name, choices[0]) not in choices:
            raise H1ExportError(path, f"{where}: {name} is {keys[name]!r}", f"one of {', '.join(choices)}")
    for name, least in (
        ("threads", 1),
        ("pairs", FIRST),
        ("bytes", 1.0),
        ("step_bytes", 1.0),
        ("nodes", 1.0),
        ("memory", 1.0),
    ):
        if not keys.get(name, least) >= least:  # NaN is neither
            raise H1ExportError(path, f"{where}: {name} is {keys[name]}", f"at least {least}")
    if missing := {"target", "quant"} - keys.keys():
        raise H1ExportError(
            path, f"{where} has no {' and no '.join(sorted(missing))}", "name the artifacts that it is for"
        )
    timings = tuple(_limit(path, f"{where}, timing {i}", item) for i, item in enumerate(keys.pop("timing", []), 1))
    clock = Clock(keys.pop("clock", Clock.CPU if keys.get("threads", 1) == 1 else Clock.WALL))
    return Gate(**keys, timings=timings, clock=clock)


def _limit(path: Path, where: str, table: Any) -> Limit:
    """Read ``decode = 512`` or ``prefill = 128``, and ``batch`` and ``slowdown``."""
    keys = _known(path, where, table, types={Phase.DECODE: int, Phase.PREFILL: int, "batch": int, "slowdown": float})
    phases = [phase for phase in Phase if phase in keys]
    if len(phases) != 1:
        raise H1ExportError(path, f"{where} has {len(phases)} of decode and prefill", "give it one, with its tokens")
    batch = keys.get("batch", 1)
    slowdown = keys.get("slowdown", Limit.slowdown)
    tokens = keys[phases[0]]
    if batch < 1 or not slowdown > 1 or tokens < (phases[0] is Phase.PREFILL):
        what = f"{where}: {phases[0]} {tokens}, batch {batch}, slowdown {slowdown}"
        raise H1ExportError(path, what, "tokens and batch are counts, and slowdown is more than 1")
    return Limit(Timing(phases[0], tokens, batch), slowdown)


def _known(path: Path, where: str, table: Any, *, types: Mapping[str, type]) -> dict[str, Any]:
    """Return ``table`` after a check that every key is known and of its type; a whole number may stand for a float."""
    prefix = f"{where}: " if where else ""
    if not isinstance(table, dict):
        raise H1ExportError(path, f"{where} is no table", "write [[gate]] and [[gate.timing]]")
    for name, value in table.items():
        if name not in types:
            raise H1ExportError(path, f"{prefix}unknown key {shown(name)}", f"one of {', '.join(types)}")
        expected = (int, float) if types[name] is float else types[name]
        if not isinstance(value, expected) or isinstance(value, bool):
            raise H1ExportError(path, f"{prefix}{name} is {shown(value)}", f"expected {types[name].__name__}")
    return dict(table)


def read_baselines(path: Path) -> dict[str, Baseline]:
    """Return "target quant" -> baseline; no entries where there is no file yet.

    Raises:
        H1ExportError: a file that h1export has not written.
    """
    if not path.exists():
        return {}
    next_step = "remove it and run h1export gate --write-baseline"
    return dict(forms.read(path, StoredBaselines, what="a baseline of this h1export", next_step=next_step).gates)


def write_baselines(path: Path, baselines: Mapping[str, Baseline]) -> None:
    """Write all baselines, completely or not at all."""
    stored = dataclasses.asdict(StoredBaselines(1, {name: baselines[name] for name in sorted(baselines)}))
    write_file(path, (json.dumps(stored, indent=1, sort_keys=True) + "\n").encode())
