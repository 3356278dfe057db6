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
from typing import Annotated, Literal

from msgspec import Meta

from h1export import forms
from h1export.artifact.manifest import Manifest
from h1export.errors import H1ExportError
from h1export.forms import Count
from h1export.quantize.choices import QuantName
from h1export.report.checks import Phase
from h1export.validate.speed.decision import FIRST
from h1export.validate.speed.statistics import Estimate
from h1export.validate.speed.worker import Timing
from h1export.writing import write_file

KIND = "a file of gates"
AS_DOCS = "write one as docs/gates.md says"
MOST_FACTOR = 1e6


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


Factor = Annotated[float, Meta(ge=1, le=MOST_FACTOR)]
MOST_TOKENS = 1 << 24


@dataclass(frozen=True)
class StoredTiming:
    """A timing of gates.toml: either ``decode``, the depth, or ``prefill``, the number of tokens."""

    decode: Annotated[int, Meta(ge=0, le=MOST_TOKENS)] | None = None
    prefill: Annotated[int, Meta(ge=1, le=MOST_TOKENS)] | None = None
    batch: Annotated[int, Meta(ge=1, le=1 << 16)] = 1
    slowdown: Annotated[float, Meta(gt=1, le=MOST_FACTOR)] = Limit.slowdown


@dataclass(frozen=True)
class StoredGate:
    """A gate of gates.toml; the names are those of ``Gate``."""

    target: Annotated[str, Meta(max_length=64)]
    quant: QuantName
    timing: tuple[StoredTiming, ...] = ()
    threads: Annotated[int, Meta(ge=1, le=1 << 12)] = 1
    clock: Clock | None = None
    pairs: Annotated[int, Meta(ge=FIRST, le=1 << 20)] = Gate.pairs
    bytes: Factor = Gate.bytes
    step_bytes: Factor = Gate.step_bytes
    nodes: Factor = Gate.nodes
    memory: Factor = Gate.memory


@dataclass(frozen=True)
class StoredGates:
    """The file gates.toml; ``baseline`` is the path of the baseline from the file's folder."""

    gate: tuple[StoredGate, ...] = ()
    baseline: Annotated[str, Meta(min_length=1, max_length=1024, pattern="^[^\\x00]*$")] | None = None


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
    text = forms.content(path, AS_DOCS)
    found = forms.parse(text, StoredGates, where=path, what=KIND, next_step="correct it", language=forms.from_toml)
    gates = tuple(_gate(path, number, stored) for number, stored in enumerate(found.gate, 1))
    named = [(gate.target, gate.quant) for gate in gates]
    for name in dict.fromkeys(named):
        if named.count(name) > 1:
            raise H1ExportError(
                path, f"has two gates for {' '.join(name)}", "keep one; another model has a file of its own"
            )
    return gates, path.parent / (found.baseline or f"{path.stem}.baseline.json")


def _gate(path: Path, number: int, stored: StoredGate) -> Gate:
    timings = tuple(_limit(path, f"gate {number}, timing {i}", item) for i, item in enumerate(stored.timing, 1))
    return Gate(
        stored.target,
        stored.quant,
        timings,
        threads=stored.threads,
        clock=stored.clock or (Clock.CPU if stored.threads == 1 else Clock.WALL),
        pairs=stored.pairs,
        bytes=stored.bytes,
        step_bytes=stored.step_bytes,
        nodes=stored.nodes,
        memory=stored.memory,
    )


def _limit(path: Path, where: str, stored: StoredTiming) -> Limit:
    given = {Phase.DECODE: stored.decode, Phase.PREFILL: stored.prefill}
    phases = [(phase, tokens) for phase, tokens in given.items() if tokens is not None]
    if len(phases) != 1:
        raise H1ExportError(path, f"{where} has {len(phases)} of decode and prefill", "give it one, with its tokens")
    return Limit(Timing(*phases[0], stored.batch), stored.slowdown)


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
