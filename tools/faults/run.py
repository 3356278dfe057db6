"""Everything of this folder, in the order of the table that it prints; ``nox -s faults`` runs it.

    python -m faults.run [--only TEXT] [--skip TEXT] [--targets NAME,...] [--most N] [--kills N] [--pairs N]
        [--seed N] [--lines]

Exit code 1: a fault.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from faults import library


def main() -> int:
    """Start the process that has loaded the library, and run everything in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name has this text")
    parser.add_argument("--skip", default="", help="leave out rows whose name has this text")
    parser.add_argument("--targets", default="all", help="targets to build, with commas between them")
    parser.add_argument("--most", type=int, default=400, help="runs of each way to fail")
    parser.add_argument("--kills", type=int, default=100, help="kills of each target's build")
    parser.add_argument("--pairs", type=int, default=24, help="pairs of builders of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", action="store_true", help="print the distinct lines of errors too")
    given = parser.parse_args()
    if library.VARIABLE not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "control").mkdir()
            os.environ["TMPDIR"] = f"{folder}/scratch/tmp"
            Path(os.environ["TMPDIR"]).mkdir(parents=True)  # otherwise the system's own folder is taken
            return library.started_with("faults.run", sys.argv[1:], Path(folder) / "control")
    from faults.rows import rows

    scratch = Path(os.environ["TMPDIR"]).parent
    found = 0
    for name, row in rows(scratch, given):
        if given.only not in name or (given.skip and given.skip in name):
            continue
        start = time.monotonic()
        result = row()
        found += len(result.faults)
        print(f"{name}: {result} ({time.monotonic() - start:.0f} s)", flush=True)
        for fault in result.faults:
            print(f"  FAULT {fault}", flush=True)
        for line in sorted(result.lines) if given.lines else ():
            print(f"  {line}", flush=True)
    print(f"{found} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
