"""Write the tables of docs/gpu.md from the results in benchmarks/results/: python tools/gpu_host/page.py."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from gpu_host import results  # noqa: E402
from gpu_host.section import SECTIONS  # noqa: E402

PAGE = ROOT / "docs" / "gpu.md"
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- (ran|failed|figures) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_RUN = "not run"
NOT_PASSED = {"done": "not passed", "failed": "ended with an error", "timeout": "killed at its limit"}
LONGEST = 160  # characters of a detail or name on the page
HIDDEN = frozenset({"quartile_1_us", "quartile_3_us", "launched", "counted_bytes", "counted_operations"})


def committed(folder: Path) -> list[dict[str, Any]]:
    """Return the sections of every gpu-*.json in ``folder``, the oldest file first.

    Raises:
        SystemExit: a file is damaged, or of a dry run.
    """
    found = []
    for path in sorted(folder.glob("gpu-*.json")):
        for section in results.read(path):
            if section["run"]["dry"]:
                raise SystemExit(f"gpu_host: {path}: is of a dry run, whose figures are never reported; remove it")
            found.append(section)
    return found


def cell(value: object) -> str:
    """Return a value as the text of a table's cell."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return re.sub(r"([\\|<>`*_\[\]])", r"\\\1", " ".join(text.split()))


def ran(sections: Iterable[Mapping[str, Any]]) -> str:
    """Return the table of what ran where; of two runs of a section on one device the later counts."""
    lines = ["| section | device | driver | CUDA | date | commit | result |", "|---|---|---|---|---|---|---|"]
    newest = {(section["letter"], section["run"]["device"]): section for section in sections}
    for known in SECTIONS:
        title = f"{known.letter}: {known.title}"
        of_it = [section for (letter, _), section in sorted(newest.items()) if letter == known.letter]
        if not of_it:
            lines.append(f"| {title} | {NOT_RUN} | | | | | {NOT_RUN} |")
        for section in of_it:
            run = section["run"]
            wrong = sum(row["passed"] is False for row in section["rows"])
            judged = sum(row["passed"] is not None for row in section["rows"])
            verdict = "passed" if results.passed(section) else NOT_PASSED[section["state"]]
            if section["state"] == "timeout":
                verdict += f" of {section['limit_s']} s"
            facts = (run["device"], run["driver"], run["cuda"], run["date"], run["revision"][:12])
            lines.append(f"| {title} | {' | '.join(map(cell, facts))} | {verdict}: {judged - wrong} of {judged} rows |")
    return "\n".join(lines) + "\n"


def failed(sections: Iterable[Mapping[str, Any]]) -> str:
    """Return the list of reasons for which rows failed, with the first row of each."""
    lines = []
    for section in sections:
        reasons: dict[str, list[str]] = {}
        for row in section["rows"]:
            if row["passed"] is False:
                reasons.setdefault(reason(row), []).append(row["name"])
        lines += [
            f"- {section['letter']}, {len(names)} rows, such as {cell(short(names[0]))}: {cell(short(why))}"
            for why, names in reasons.items()
        ]
    return "\n".join(lines or ["No row failed."]) + "\n"


def reason(row: Mapping[str, Any]) -> str:
    """Return why a row failed: the first line of its detail, or that its figure misses what is required."""
    share = row["figures"].get("roofline_share")
    if share is not None:
        return "less than the share of the roofline that is required"
    return (row["detail"].splitlines() or ["no detail"])[0]


def short(text: str) -> str:
    """Return a text that is short enough for a line of the page."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def figures(sections: Iterable[Mapping[str, Any]]) -> str:
    """Return the table of figures of the sections d to g, without those that only explain others."""
    rows = []
    for section in sections:
        for row in section["rows"] if section["letter"] in "defg" else ():
            shown = {name: value for name, value in row["figures"].items() if name not in HIDDEN and value is not None}
            if shown:
                listed = ", ".join(f"{cell(name)} {cell(value)}" for name, value in shown.items())
                remark = cell(short(" ".join(row["detail"].split())))
                where = f"{cell(section['run']['device'])} | {section['run']['date']}"
                rows.append(f"| {section['letter']} | {cell(row['name'])} | {listed} | {remark} | {where} |")
    if not rows:
        return "There is no figure of a GPU.\n"
    return (
        "\n".join(["| section | what | figures | remark | device | date |", "|---|---|---|---|---|---|", *rows]) + "\n"
    )


def filled(page: str, sections: list[dict[str, Any]]) -> str:
    """Return the page with all tables written anew."""
    tables = {"ran": ran(sections), "failed": failed(sections), "figures": figures(sections)}
    return MARK.sub(lambda match: f"{match[1]}{tables[match[2]]}{match[3]}", page)


def main() -> None:
    """Write the page."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), committed(RESULTS)), encoding="utf-8")


if __name__ == "__main__":
    main()
