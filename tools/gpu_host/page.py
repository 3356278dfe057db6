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
MARK = re.compile(r"(<!-- (ran|figures) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_RUN = "not run"


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
            failed = sum(row["passed"] is False for row in section["rows"])
            judged = sum(row["passed"] is not None for row in section["rows"])
            verdict = "passed" if results.passed(section) else f"not passed ({section['state']})"
            facts = (run["device"], run["driver"], run["cuda"], run["date"], run["revision"][:12])
            lines.append(
                f"| {title} | {' | '.join(map(cell, facts))} | {verdict}: {judged - failed} of {judged} rows |"
            )
    return "\n".join(lines) + "\n"


def figures(sections: Iterable[Mapping[str, Any]]) -> str:
    """Return the table of figures of the sections d to f."""
    rows = [
        f"| {cell(row['name'])} | {', '.join(f'{cell(k)} {cell(v)}' for k, v in row['figures'].items())} "
        f"| {cell(section['run']['device'])} | {section['run']['date']} |"
        for section in sections
        if section["letter"] in "def"
        for row in section["rows"]
        if row["figures"]
    ]
    if not rows:
        return "There is no figure of a GPU.\n"
    return "\n".join(["| what | figures | device | date |", "|---|---|---|---|", *rows]) + "\n"


def filled(page: str, sections: list[dict[str, Any]]) -> str:
    """Return the page with both tables written anew."""
    tables = {"ran": ran(sections), "figures": figures(sections)}
    return MARK.sub(lambda match: f"{match[1]}{tables[match[2]]}{match[3]}", page)


def main() -> None:
    """Write the page."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), committed(RESULTS)), encoding="utf-8")


if __name__ == "__main__":
    main()
