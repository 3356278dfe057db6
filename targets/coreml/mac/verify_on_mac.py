"""Check this artifact on a Mac: compare every compute unit with golden.npz, and measure its speed.

    pip install coremltools numpy
    python verify_on_mac.py

The script needs macOS 15 and the files in its folder. It prints a table and writes report.json. Exit code 0 means
passed, 1 failed, and 2 that the check could not be run. CPU_ONLY and the units that mac.json names must pass; the
figures of the other units are for information.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args
from zipfile import BadZipFile

import numpy as np

HERE = Path(__file__).resolve().parent
PACKAGE = "model.mlpackage"
SETTINGS = "mac.json"
GOLDEN = "golden.npz"
MANIFEST = "manifest.json"
REPORT = "report.json"
# prefixes of the state inputs, and of the outputs that replace them, in a package built with --state-io
PAST = "past_key_values_"
PRESENT = "present_"
FORMAT = 1  # the version of golden.npz's format
# kinds of rows, as in h1export's report/checks.py
CASE = "case"
LATENCY = "latency"
LOADING = "loading"

UnitsName = Literal["CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL"]
UNITS: tuple[UnitsName, ...] = get_args(UnitsName)
Ids = np.ndarray[Any, Any]  # int32 [count]
Row = np.ndarray[Any, Any]  # logits, float32 [vocab]


class CannotRunError(Exception):
    """The check cannot be run here, so there is no verdict about the artifact."""


@dataclass(frozen=True)
class Settings:
    """The content of mac.json, which states how the package was built.

    Attributes:
        max_context: the tokens that the states have room for.
        chunk: the tokens of a prefill call.
        compute: the compute units that the package is meant for, by coremltools' names.
        state_io: whether states are inputs and outputs.
        last_logits: whether prefill returns the logits of the last valid token only.
    """

    max_context: int
    chunk: int = 64
    compute: UnitsName = "CPU_AND_GPU"
    state_io: bool = False
    last_logits: bool = False

    def must_pass(self, unit: str) -> bool:
        """Return whether the artifact fails if ``unit`` fails."""
        return unit in ("CPU_ONLY", self.compute)


@dataclass(frozen=True)
class Case:
    """A case of golden.npz: a prompt of ``prompt`` ids, the ids to decode after it, and the logits by position."""

    ids: Ids
    prompt: int
    golden: Mapping[int, Row]

    @property
    def name(self) -> str:
        """The name of the case in the report."""
        return f"{self.prompt} token{'s' if self.prompt > 1 else ''}"


class Function:
    """A function of the package on a compute unit, run by coremltools."""

    def __init__(self, package: Path, name: str, units: str) -> None:
        tools = import_module("coremltools")
        self._model = tools.models.MLModel(str(package), function_name=name, compute_units=tools.ComputeUnit[units])
        description = self._model.get_spec().description
        described = next((one for one in description.functions if one.name == name), description)
        self.inputs = {feature.name: tuple(feature.type.multiArrayType.shape) for feature in described.input}

    def make_state(self) -> Any:
        """Return a new state of zeros."""
        return self._model.make_state()

    def predict(self, feeds: Mapping[str, Any], state: Any) -> Mapping[str, Any]:
        """Run the function on ``feeds`` and return its outputs; it updates ``state`` unless that is None."""
        options = {} if state is None else {"state": state}
        outputs: Mapping[str, Any] = self._model.predict(dict(feeds), **options)
        return outputs


def load(package: Path, name: str, units: str) -> Function:
    """Load a function of the package; raise CannotRunError without macOS 15 or coremltools. Tests replace this."""
    version = platform.mac_ver()[0]
    if platform.system() != "Darwin" or int(version.split(".")[0] or 0) < 15:
        system = f"macOS {version}" if version else platform.system()
        raise CannotRunError(
            f"this is {system}, and Core ML runs this package on macOS 15 or later; copy the folder to such a Mac"
        )
    try:
        return Function(package, name, units)
    except ImportError as error:
        raise CannotRunError(f"coremltools cannot be imported ({error}); pip install coremltools") from None


def calls(length: int, settings: Settings, position: int = 0) -> Iterator[tuple[str, int, int]]:
    """Yield (function, position, tokens): chunks for prefill while a whole one fits, then single tokens for decode."""
    while length:
        fits = position + settings.chunk <= settings.max_context
        count = min(length, settings.chunk) if fits else 1
        yield "prefill" if fits else "decode", position, count
        position = position + count
        length = length - count


class Session:
    """A sequence whose states both functions share; the function ``first`` creates them."""

    def __init__(self, functions: Mapping[str, Function], settings: Settings, first: str) -> None:
        self._functions = functions
        self._chunk = settings.chunk
        inputs = functions[first].inputs
        self._past: dict[str, Any] = {
            name: np.zeros(shape, np.float32) for name, shape in inputs.items() if name.startswith(PAST)
        }
        self._state = None if settings.state_io else functions[first].make_state()

    def call(self, name: str, position: int, ids: Ids) -> dict[int, Row]:
        """Process ``ids`` [count], padded with id 0, and return the logits that the function computes, by position."""
        padded = np.zeros((1, self._chunk if name == "prefill" else 1), np.int32)
        padded[0, : len(ids)] = ids
        feeds = {"input_ids": padded, "position": np.array([position], np.int32), **self._past}
        if name == "prefill":
            feeds["n_valid"] = np.array([len(ids)], np.int32)
        outputs = self._functions[name].predict(feeds, self._state)
        self._past = {past: outputs[PRESENT + past.removeprefix(PAST)] for past in self._past}
        logits = np.asarray(outputs["logits"], np.float32)[0]
        first = position + len(ids) - 1 if len(logits) == 1 else position
        return {first + row: logits[row] for row in range(min(len(logits), len(ids)))}

    def decode(self, position: int, ids: Ids) -> dict[int, Row]:
        """Process ``ids`` [count] in one decode call each, and return their logits by position."""
        found: dict[int, Row] = {}
        for step in range(len(ids)):
            found |= self.call("decode", position + step, ids[step : step + 1])
        return found


def run_case(functions: Mapping[str, Function], settings: Settings, case: Case) -> tuple[list[tuple[Row, Row]], str]:
    """Run a case and return the pairs of (computed, golden) logits, and a note.

    decode continues with the states that prefill has filled, which is possible because both functions declare the same
    states. It is not certain that every system allows it; if it raises an error, decode processes the prompt too.
    """
    session = Session(functions, settings, "prefill")
    prefilled = 0
    logits: dict[int, Row] = {}
    for name, position, count in calls(case.prompt, settings):
        if name == "prefill":
            logits |= session.call(name, position, case.ids[position : position + count])
            prefilled = position + count
    try:
        decoded = session.decode(prefilled, case.ids[prefilled:])
        note = ""
    except Exception as error:
        if settings.state_io:
            raise
        decoded = Session(functions, settings, "decode").decode(0, case.ids)
        note = f"decode refused the states of prefill, and processed the prompt itself: {str(error)[:200]}"
    pairs = [
        (computed[position], row)
        for computed in (logits, decoded)
        for position, row in case.golden.items()
        if position in computed
    ]
    return pairs, note


def figures_of(pairs: Sequence[tuple[Row, Row]]) -> dict[str, float]:
    """Return the figures of the pairs of (computed, golden) logits.

    "logits" is the largest difference divided by the range of the golden row, in the worst row; it is NaN if one is not
    finite. "top1" is the fraction of rows with the same argmax.
    """
    errors = [
        float(np.abs(computed - golden).max()) / (float(golden.max() - golden.min()) or 1.0)
        for computed, golden in pairs
    ]
    worst = max(errors) if all(map(math.isfinite, errors)) else math.nan
    equal = sum(int(computed.argmax() == golden.argmax()) for computed, golden in pairs)
    return {"logits": worst, "top1": equal / len(pairs)}


def report_row(
    kind: str,
    unit: str,
    figures: Mapping[str, float],
    *,
    tolerance: float | None = None,
    note: str = "",
    case: str = "",
    length: int | None = None,
) -> dict[str, Any]:
    """Return a row in the form of h1export's own reports; ``tolerance`` is that of the figure "logits"."""
    tolerances = {} if tolerance is None else {"logits": tolerance}
    verdict = "n/a" if not figures else "pass" if tolerances else "info"
    beyond = tolerance is not None and not figures["logits"] <= tolerance
    if beyond or any(math.isnan(value) for value in figures.values()):
        verdict = "FAIL"
    comparison = "alone" if kind == LATENCY else "golden"
    shown = {name: str(value) if math.isnan(value) else value for name, value in figures.items()}
    row: dict[str, Any] = {"kind": kind, "comparison": comparison, "case": case, "phase": None, "length": length}
    row |= {"device": unit, "figures": shown, "tolerances": tolerances, "note": note}
    return row | {"details": {}, "histograms": {}, "verdict": verdict}


def case_row(
    functions: Mapping[str, Function], settings: Settings, case: Case, *, unit: str, tolerance: float
) -> dict[str, Any]:
    """Return the row of a case on a unit; an error is a failure on a unit that must pass, and a note on others."""
    limit = tolerance if settings.must_pass(unit) else None
    try:
        pairs, note = run_case(functions, settings, case)
        figures = figures_of(pairs)
        rows = "not finite" if math.isnan(figures["logits"]) else f"{len(pairs)} rows of logits"
        note = f"{note}; {rows}" if note else rows
    except Exception as error:
        figures = {"logits": math.nan, "top1": 0.0}
        note = f"{type(error).__name__}: {str(error)[:200]}"
    if limit is None and math.isnan(figures["logits"]):
        figures = {}
    return report_row(CASE, unit, figures, tolerance=limit, note=note, case=case.name, length=len(case.ids))


def latency_row(functions: Mapping[str, Function], settings: Settings, unit: str, *, repeats: int) -> dict[str, Any]:
    """Return the row of the median milliseconds of a prefill chunk at position 0, and of the token after it."""
    ids = np.ones(settings.chunk, np.int32)
    figures = {}
    try:
        session = Session(functions, settings, "prefill")
        for name, position, count in (("prefill", 0, settings.chunk), ("decode", settings.chunk, 1)):
            figures[f"{name}_ms"] = 1000 * _median_seconds(partial(session.call, name, position, ids[:count]), repeats)
    except Exception as error:
        return report_row(LATENCY, unit, {}, note=f"{type(error).__name__}: {str(error)[:200]}")
    note = f"median of {repeats}: a chunk of {settings.chunk} tokens, one token after it"
    return report_row(LATENCY, unit, figures, note=note)


def _median_seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def unit_rows(
    settings: Settings, cases: Sequence[Case], tolerance: float, *, unit: str, repeats: int
) -> list[dict[str, Any]]:
    """Return all rows of a unit; raise CannotRunError if it cannot be judged. Other errors become rows."""
    try:
        functions = {name: load(HERE / PACKAGE, name, unit) for name in ("prefill", "decode")}
    except CannotRunError:
        raise
    except Exception as error:
        must_pass = settings.must_pass(unit)
        note = f"cannot be loaded: {type(error).__name__}: {str(error)[:200]}"
        figures = {"logits": math.nan} if must_pass else {}
        return [report_row(LOADING, unit, figures, tolerance=tolerance if must_pass else None, note=note)]
    shape = functions["prefill"].inputs.get("input_ids")
    if shape != (1, settings.chunk):
        raise CannotRunError(
            f"{PACKAGE}: prefill takes input_ids {shape}, and {SETTINGS} has chunks of {settings.chunk}; build it again"
        )
    rows = [case_row(functions, settings, case, unit=unit, tolerance=tolerance) for case in cases]
    return [*rows, latency_row(functions, settings, unit, repeats=repeats)]


def read_settings(folder: Path) -> Settings:
    """Read mac.json; raise CannotRunError if it is missing or has other content."""
    try:
        return Settings(**json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CannotRunError(f"{SETTINGS} cannot be read ({error}); copy the whole artifact") from None


def read_golden(folder: Path, settings: Settings) -> tuple[list[Case], float]:
    """Read the cases and their tolerance of logits; raise CannotRunError if they are missing, damaged or too long."""
    try:
        with np.load(folder / GOLDEN, allow_pickle=False) as data:
            if int(data["format"]) != FORMAT:
                raise ValueError(f"format {int(data['format'])}, and this script reads format {FORMAT}")
            ids = data["ids"]
            steps = int(data["steps"])
            golden = dict(zip(data["positions"].tolist(), data["logits"].astype(np.float32), strict=True))
            cases = [Case(ids[: length + steps], length, golden) for length in data["prompts"].tolist()]
            tolerance = float(data["tolerance"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise CannotRunError(f"{GOLDEN} cannot be read ({error}); copy the whole artifact") from None
    for case in cases:
        if len(case.ids) > settings.max_context:
            raise CannotRunError(
                f"{GOLDEN}: {case.name!r} is longer than {settings.max_context} tokens; build the artifact again"
            )
    return cases, tolerance


def read_subject(folder: Path) -> dict[str, Any]:
    """Read the artifact's description from manifest.json, if there is one; raise CannotRunError if it is damaged."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8") if (folder / MANIFEST).exists() else "{}"
        return {
            name: value for name, value in json.loads(text).items() if name in ("target", "scheme", "options", "source")
        }
    except (OSError, ValueError, AttributeError) as error:
        raise CannotRunError(f"{MANIFEST} cannot be read ({error}); copy the whole artifact") from None


def report_of(settings: Settings, subject: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the report in the schema of h1export's own report.json."""
    packages = {"numpy": np.__version__}
    if (tools := sys.modules.get("coremltools")) is not None:
        packages["coremltools"] = str(tools.__version__)
    environment = {"machine": platform.machine(), "system": f"{platform.system()} {platform.mac_ver()[0]}".strip()}
    environment["python"] = platform.python_version()
    notes = [f"made for {settings.compute}", f"chunks of {settings.chunk} tokens"]
    passed = all(row["verdict"] != "FAIL" for row in rows)
    return {
        "passed": passed,
        "subject": {**subject, "notes": notes},
        "environment": {**environment, "packages": packages},
        "rows": list(rows),
    }


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each row."""
    labels = [f"{row['case'] or row['kind']}, {row['device']}" for row in rows]
    width = max(map(len, labels))
    for row, label in zip(rows, labels, strict=True):
        figures = "  ".join(
            f"{name} {value if isinstance(value, str) else format(value, '.4g')}"
            for name, value in row["figures"].items()
        )
        tolerances = "".join(f" (tolerance {value:.3g})" for value in row["tolerances"].values())
        print(f"{row['verdict']:4}  {label:{width}}  {figures}{tolerances}  {row['note']}".rstrip())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check and return the exit code: 0 passed, 1 failed, 2 could not be run."""
    parser = argparse.ArgumentParser(description="Check this artifact on a Mac.")
    parser.add_argument("--units", nargs="+", choices=UNITS, default=UNITS, help="compute units [default: all]")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each function [default: 20]")
    arguments = parser.parse_args(argv)
    try:
        settings = read_settings(HERE)
        cases, tolerance = read_golden(HERE, settings)
        subject = read_subject(HERE)
        rows = []
        for unit in arguments.units:
            rows += unit_rows(settings, cases, tolerance, unit=unit, repeats=arguments.repeats)
    except CannotRunError as error:
        print(f"verify_on_mac: {error}", file=sys.stderr)
        return 2
    report = report_of(settings, subject, rows)
    print_table(rows)
    (HERE / REPORT).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if not any(row["tolerances"] for row in rows):
        what = f"only CPU_ONLY and {settings.compute} have tolerances; written to {REPORT}"
        print(f"nothing was judged: {what}", file=sys.stderr)
        return 2
    print(f"{'passed' if report['passed'] else 'FAILED'}; written to {REPORT}")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
