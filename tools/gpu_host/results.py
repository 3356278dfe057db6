"""The files that a run leaves: one JSON a section, and results.json with all of them; the standard library only."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FILE = "results.json"
FORMAT = 1
LARGEST = 16 << 20  # bytes of a file
STATES = ("done", "failed", "timeout")
RUN_KEYS = {"device", "driver", "cuda", "date", "revision", "versions", "dry"}
SECTION_KEYS = {"format", "letter", "title", "state", "seconds", "limit_s", "rows", "log", "run"}
ROW_KEYS = {"name", "passed", "figures", "detail"}


def write_json(path: Path, value: object) -> None:
    """Write a file in one step.

    Raises:
        ValueError: it is larger than LARGEST.
    """
    data = (json.dumps(value, indent=1) + "\n").encode()
    if len(data) > LARGEST:
        raise ValueError(f"{path.name} has {len(data)} bytes, and {LARGEST} is the most")
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)


def section_file(letter: str) -> str:
    """Return the name of a section's file."""
    return f"section-{letter}.json"


def passed(section: Mapping[str, Any]) -> bool:
    """Whether the section ended by itself, yielded a row, and none of its rows failed."""
    return (
        section["state"] == "done" and bool(section["rows"]) and all(r["passed"] is not False for r in section["rows"])
    )


def problems(section: Any) -> list[str]:
    """What is wrong with a section's JSON; empty when it is what run.py writes."""
    if not isinstance(section, dict) or set(section) != SECTION_KEYS or section["format"] != FORMAT:
        return ["the keys or the format are not run.py's"]
    found = []
    if section["state"] not in STATES:
        found.append(f"state {str(section['state'])[:40]!r}")
    if not isinstance(section["run"], dict) or set(section["run"]) != RUN_KEYS:
        found.append("the facts of the run")
    if not isinstance(section["rows"], list):
        return [*found, "rows"]
    for number, row in enumerate(section["rows"]):
        if not isinstance(row, dict) or set(row) != ROW_KEYS or row["passed"] not in (True, False, None):
            found.append(f"row {number}")
        elif not isinstance(row["figures"], dict) or not all(
            isinstance(value, int | float | str | None) for value in row["figures"].values()
        ):
            found.append(f"the figures of row {number}")
    return found


def collect(out: Path, letters: Iterable[str]) -> dict[str, Any]:
    """Write results.json from the sections' files in ``out``, and return it."""
    files = [out / section_file(letter) for letter in letters]
    sections = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    results = {"format": FORMAT, "sections": sections}
    write_json(out / FILE, results)
    return results


def read(path: Path) -> list[dict[str, Any]]:
    """Return the sections of a results.json.

    Raises:
        SystemExit: it is damaged, or no file of run.py's.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise SystemExit(f"gpu_host: {path}: is no JSON; copy it again from the GPU host") from None
    sections = results.get("sections") if isinstance(results, dict) and results.get("format") == FORMAT else None
    if not isinstance(sections, list):
        raise SystemExit(f"gpu_host: {path}: is no results file of format {FORMAT}; copy it again from the GPU host")
    for section in sections:
        if wrong := problems(section):
            raise SystemExit(f"gpu_host: {path}: {wrong[0]}: not what run.py writes; copy it again from the GPU host")
    return sections


def table(sections: Iterable[Mapping[str, Any]]) -> str:
    """Return the summary as text, a line a section, and a line a failed row."""
    lines = [f"{'':3}{'section':62}{'state':9}{'rows':>6}{'failed':>8}{'s':>8}"]
    for section in sections:
        failed = [row for row in section["rows"] if row["passed"] is False]
        lines.append(
            f"{section['letter']:3}{section['title']:62.61}{section['state']:9}{len(section['rows']):6}"
            f"{len(failed):8}{section['seconds']:8.1f}"
        )
        lines += [f"     FAILED {row['name']}: {' '.join(row['detail'].split())[:100]}" for row in failed[:10]]
        if section["state"] == "failed" and section["log"]:
            lines.append(f"     {section['log'].splitlines()[-1][:110]}")
    return "\n".join(lines)
