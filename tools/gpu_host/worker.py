"""The process of one section: python worker.py MODULE BUNDLE WORK DEVICE ROWS, started by run.py."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from gpu_host.section import Host, Row

LONGEST_DETAIL = 2000  # characters


def line(row: Row) -> str:
    """Return a row as one line of JSON; whatever is no number, text or null becomes text."""
    fields = asdict(row) | {"figures": dict(row.figures), "detail": row.detail[:LONGEST_DETAIL]}
    return json.dumps(fields, default=str) + "\n"


def main(module: str, bundle: str, work: str, *, device: str, rows: str) -> None:
    """Write each row of the section when it is yielded."""
    host = Host(Path(bundle), Path(work), device)
    run = importlib.import_module(f"gpu_host.sections.{module}").run
    with Path(rows).open("a", encoding="utf-8") as stream:
        for row in run(host):
            stream.write(line(row))
            stream.flush()


if __name__ == "__main__":
    main(*sys.argv[1:4], device=sys.argv[4], rows=sys.argv[5])
