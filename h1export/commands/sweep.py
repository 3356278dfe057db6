"""Sweep: many builds of many checkpoints, each judged. A cell is one of them; what is finished is not done again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from h1export import __version__, forms
from h1export.artifact.artifact import REPORT, Artifact
from h1export.checkpoint.resolve import resolve
from h1export.commands.bench import bench_artifact
from h1export.commands.build import build_artifact
from h1export.commands.load import load_runner
from h1export.commands.validate import validate_artifact
from h1export.errors import H1ExportError
from h1export.forms import Count
from h1export.quantize.calibration import Calibration
from h1export.quantize.choices import BEST, QuantName
from h1export.quantize.scheme import QuantScheme
from h1export.report.checks import CheckKind, Comparison
from h1export.report.report import Report
from h1export.report.swept import KL, Swept
from h1export.targets import TargetOptions, options_class, target_infos
from h1export.targets.options import option_fields
from h1export.validate.speed.bench import BenchOptions

WHAT = "a sweep"
NEXT_STEP = "docs/sweep.md has an example with every key"
KEY_DIGITS = 8  # of a cell's name
GROUPED: QuantName = "int4"  # the precision for which methods and group sizes are tried; the others have one
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Positive = Annotated[int, Meta(ge=1, le=1 << 24)]
Names = Annotated[tuple[str, ...], Meta(min_length=1)]


@dataclass(frozen=True)
class Text:
    """The key ``calibration``: as the options of `h1export build` of these names."""

    file: str | None = None
    samples: Positive = Calibration.samples
    length: Positive = Calibration.length
    seed: Count = 0
    device: str = Calibration.device


@dataclass(frozen=True)
class Judge:
    """The key ``validate``: as the options of `h1export validate` of these names."""

    text: str | None = None
    text_bytes: Count = 32768
    prompts: Count = 8
    quick: bool = False
    kernels: str = "auto"


@dataclass(frozen=True)
class Speed:
    """The key ``speed``: as the options of `h1export bench`, one of each."""

    depth: Count = 0
    prefill: Positive = 128
    threads: Positive = 1
    repeats: Positive = 5


@dataclass(frozen=True)
class Tasks:
    """The key ``tasks``: as the options of `h1export eval`."""

    names: Names
    include: str | None = None
    fewshot: Count | None = None
    limit: Positive | None = None
    chat: bool = False


@dataclass(frozen=True)
class Sweep:
    """A sweep.yaml.

    Attributes:
        checkpoints: name -> folder or Hub id; null is the embedded model. Folders are relative to the file.
        targets: the runtimes.
        precisions: the precisions of the weights.
        methods: how the integers of int4 are chosen.
        group_sizes: columns that share a scale of int4.
        options: target -> its options.
        calibration: the text on which methods look.
        validate: how artifacts are judged.
        speed: what is timed; null: nothing.
        tasks: what lm-evaluation-harness asks; null: nothing.
        cpus: the cores of a cell; 0: those of the machine, so that no cell disturbs the times of another one.
        gpus: the GPUs of a cell.
    """

    checkpoints: Annotated[Mapping[Name, str | None], Meta(min_length=1)]
    targets: Names
    precisions: Annotated[tuple[QuantName, ...], Meta(min_length=1)] = ("int4",)
    methods: Names = (BEST[GROUPED],)
    group_sizes: Annotated[tuple[Positive, ...], Meta(min_length=1)] = (32,)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    calibration: Text = field(default_factory=Text)
    validate: Judge = field(default_factory=Judge)
    speed: Speed | None = None
    tasks: Tasks | None = None
    cpus: Count = 0
    gpus: Count = 0

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """Read a file. Raises H1ExportError where it cannot be read, or is not of this form."""
        text = forms.content(path, NEXT_STEP)
        return forms.parse(text, cls, where=path, what=WHAT, next_step=NEXT_STEP, language=forms.from_yaml)


@dataclass(frozen=True)
class Cell:
    """A build and how it is judged. It can go to another process, and to another machine with the same folders."""

    checkpoint: str
    model: str | None
    target: str
    scheme: QuantScheme
    options: TargetOptions
    calibration: Calibration
    validate: Judge
    speed: Speed | None
    tasks: Tasks | None
    key: str

    @property
    def name(self) -> str:
        """The name of its folder and of its file."""
        parts = [self.checkpoint, self.target, self.scheme.quant]
        if self.scheme.quant == GROUPED:
            parts += [self.scheme.method, f"g{self.scheme.group_size}"]
        return "-".join((*parts, self.key[:KEY_DIGITS]))

    def swept(self, **found: Any) -> Swept:
        """Return what was found out about the cell."""
        grouped = self.scheme.quant == GROUPED
        return Swept(
            self.name,
            self.key,
            checkpoint=self.checkpoint,
            target=self.target,
            precision=self.scheme.quant,
            method=self.scheme.method if self.scheme.quant != "none" else "",
            group_size=self.scheme.group_size if grouped else 0,
            **found,
        )


Score = Callable[[Cell, Path], Mapping[str, float]]


def cells(sweep: Sweep, base: Path) -> list[Cell]:
    """Return the cells of a sweep, whose folders and files are relative to ``base``; every setting is checked.

    Raises:
        H1ExportError: an unknown target, precision, method or option, or a file that is not there.
    """
    calibration = Calibration(
        _file(sweep.calibration.file, base),
        sweep.calibration.samples,
        sweep.calibration.length,
        seed=sweep.calibration.seed,
        device=sweep.calibration.device,
    )
    text, include = _file(sweep.validate.text, base), _file(sweep.tasks.include if sweep.tasks else None, base)
    judge = Judge(**{**asdict(sweep.validate), "text": None if text is None else str(text)})
    given = {} if sweep.tasks is None else asdict(sweep.tasks)
    tasks = Tasks(**{**given, "include": None if include is None else str(include)}) if given else None
    if unknown := sorted(sweep.options.keys() - set(sweep.targets)):
        raise H1ExportError("options", f"{unknown[0]!r} is none of the targets", "leave it out, or add it to targets")
    options = {target: _options(target, sweep.options.get(target, {})) for target in sweep.targets}
    schemes = [
        QuantScheme(quant, group, method)
        for quant in dict.fromkeys(sweep.precisions)
        for method in (dict.fromkeys(sweep.methods) if quant == GROUPED else (BEST[quant],))
        for group in (dict.fromkeys(sweep.group_sizes) if quant == GROUPED else (QuantScheme.group_size,))
    ]
    found = []
    for (name, model), target, scheme in product(sweep.checkpoints.items(), options, schemes):
        where = _model(model, base)
        settings = (scheme, options[target], calibration, judge, sweep.speed, tasks)
        decides = [__version__, target, _files(where), *(None if one is None else asdict(one) for one in settings)]
        key = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()
        found.append(Cell(name, where, target, *settings, key))
    return found


def run_cell(cell: Cell, folder: Path, score: Score | None, *, jobs: int = 0) -> Swept:
    """Return what is known of a cell: what its file in ``folder`` says, or what building and judging it shows.

    Its artifact and its file are in ``folder``. Each step that a killed run has finished is not done again. An error of
    the cell's own, such as a precision that the target does not have, is in what is returned.

    Args:
        cell: The cell.
        folder: A folder that exists, and that all machines have.
        score: Returns the scores of an artifact, where the cell asks for tasks.
        jobs: Threads that compute weights; 0: one a core.
    """
    out = folder / cell.name
    if (known := finished(cell, folder)) is not None:
        return known
    try:
        found = _judged(cell, out, score, jobs=jobs)
    except H1ExportError as error:
        found = cell.swept(error=str(error))
    found.write(folder)
    return found


def finished(cell: Cell, folder: Path) -> Swept | None:
    """Return what is known of a cell that is finished, and whose artifact is there; None for any other."""
    try:
        known = Swept.read(folder / f"{cell.name}.json")
        whole = not known.error and known.key == cell.key
        return known if whole and Artifact.open(folder / cell.name).identity == known.identity else None
    except H1ExportError:
        return None


def _judged(cell: Cell, out: Path, score: Score | None, *, jobs: int) -> Swept:
    checkpoint = resolve(cell.model)
    if not _is_artifact(out):
        build_artifact(
            checkpoint,
            cell.target,
            out,
            scheme=cell.scheme,
            options=cell.options,
            jobs=jobs,
            calibration=cell.calibration,
        )
    artifact = Artifact.open(out)
    if not (out / REPORT).is_file():
        validate_artifact(
            out,
            checkpoint,
            {},
            text=None if cell.validate.text is None else Path(cell.validate.text),
            text_bytes=cell.validate.text_bytes,
            latency_pairs=0,
            kernels=cell.validate.kernels,
            prompts=cell.validate.prompts,
            quick=cell.validate.quick,
        )
    report = Report.read(out / REPORT)
    figures, note = _accuracy(report), ""
    if cell.speed is not None:
        speeds, note = _speeds(artifact, cell.speed, cell.validate.kernels)
        figures |= speeds
    return cell.swept(
        identity=artifact.identity,
        nbytes=sum(size for _, size in artifact.manifest.files.values()),
        passed=report.passed,
        figures=figures,
        tasks=dict(score(cell, out)) if score is not None and cell.tasks is not None else {},
        note=note,
    )


def _accuracy(report: Report) -> dict[str, float]:
    """Return the divergence and the bits per byte of the text, where it was scored."""
    rows = [row for row in report.rows if (row.kind, row.comparison) == (CheckKind.TEXT, Comparison.SOURCE)]
    figures = rows[0].figures if rows else {}
    names = {KL: KL, "artifact": "bits_per_byte"}
    return {title: figures[name] for name, title in names.items() if name in figures}


def _speeds(artifact: Artifact, speed: Speed, kernels: str) -> tuple[dict[str, float], str]:
    """Return the tokens a second of each phase, and why there are none where something emulates the runtime."""
    runner = load_runner(artifact, speed.threads, kernels=kernels)
    emulated, kind = runner.provenance.emulated, runner.provenance.kernels
    del runner  # the process that is timed needs the memory
    if emulated:
        return {}, f"computed by {kind}: its speed says nothing"
    options = BenchOptions((speed.depth,), (speed.prefill,), (speed.threads,), repeats=speed.repeats)
    report = bench_artifact(artifact.folder, None, None, options=options, kernels=kernels)
    return {str(one.phase): one.tokens_per_second.median for one in report.speeds}, ""


def _is_artifact(out: Path) -> bool:
    try:
        Artifact.open(out)
    except H1ExportError:
        return False
    return True


def _file(name: str | None, base: Path) -> Path | None:
    """Return the path of a file or folder that the sweep names; raise H1ExportError where there is none."""
    if name is None:
        return None
    path = (base / name).absolute()
    if not path.exists():
        raise H1ExportError(path, "does not exist", "correct the sweep")
    return path


def _model(model: str | None, base: Path) -> str | None:
    """Return the absolute folder of a checkpoint, or its Hub id."""
    return str((base / model).absolute()) if model is not None and (base / model).exists() else model


def _files(model: str | None) -> Any:
    """Return what tells whether a checkpoint's folder is the same as before: names, sizes and times of its files."""
    if model is None or not Path(model).is_dir():
        return model
    files = sorted(path for path in Path(model).iterdir() if path.is_file())
    return [model, *((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)]


def _options(target: str, given: Mapping[str, Any]) -> TargetOptions:
    """Return the options of a target; raise H1ExportError where it is unknown, or does not take them."""
    if target not in target_infos():
        raise H1ExportError("targets", f"{target!r} is unknown", f"one of {', '.join(target_infos())}")
    known = {one.name: one for one in option_fields(options_class(target))}
    if unknown := sorted(given.keys() - known.keys()):
        raise H1ExportError(f"options of {target}", f"{unknown[0]!r} is unknown", f"one of {', '.join(known)}")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return options_class(target)(**values)


def in_turn(work: Callable[[Cell], Swept], wanted: list[Cell]) -> Iterator[Swept]:
    """Yield what is known of each cell, one after the other, in this process."""
    yield from map(work, wanted)
