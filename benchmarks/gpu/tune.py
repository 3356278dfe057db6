"""Search for the fastest tiles of the scan on this GPU, and write them to MEASURED in plugins/ssm_scan/tiles.py.

    PYTHONPATH=.:tools python -m benchmarks.gpu.tune [--budget 300] [--json FILE] [--write]

Candidates are the tiles of FIRST, and then the neighbours of the best row so far: half and twice each size, the warps
and the stages, one kernel at a time. One that does not compile, or is wrong against the float64 recurrence, is dropped
before it is timed. Without --write the source stays as it is; a dry run never writes.
"""

from __future__ import annotations

import argparse
import ast
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.gpu import clock, contenders, results
from benchmarks.gpu.kernels import DRY, Case, bound_call, checked, first_line
from gpu_host.section import Row
from roofline import PUBLISHED, Shape

from h1export.plugins.ssm_scan import tiles as table
from h1export.plugins.ssm_scan.tiles import MEASURED, TILES, ScanTiles, Tile, tiles_for

Sizes = tuple[int, int]
PREFILL = (1, 4096)  # batch and tokens on which a prompt's tiles are timed
DECODE = (64, 1)
DRY_PREFILL, DRY_DECODE = (1, 70), (1, 1)
LEAST = 16  # rows, columns and tokens of a product on tensor cores
# Tiles that issue fewer instructions for the same work, counted in the machine code after an H100 had timed the kernels
# (docs/kernels.md): 64 rows for 4 warps instead of 8, more tokens a product, fewer programs that compute the same.
FIRST: Mapping[str, tuple[Tile, ...]] = {
    "chunk_scan": (
        Tile(64, 64, 128, 4, 2),
        Tile(64, 64, 64, 4, 2),
        Tile(64, 64, 64, 4, 3),
        Tile(128, 64, 128, 8, 2),
    ),
    "chunk_state": (Tile(64, 64, 128, 4, 2), Tile(64, 64, 128, 4, 3), Tile(64, 64, 64, 4, 3)),
    "state_passing": (Tile(1, 256, 1, 2, 4), Tile(1, 2048, 1, 8, 4)),
}
GAIN = 0.98  # a candidate replaces the present tile only when it takes less than this share of its time


def first(row: ScanTiles, sizes: Sizes, kernel: str) -> list[ScanTiles]:
    """Return ``row`` with each tile of FIRST for ``kernel`` that fits the sizes and differs."""
    made = [row._replace(**{kernel: tile}) for tile in FIRST.get(kernel, ())]
    return [each for each in made if each != row and fits(each, sizes)]


def neighbours(row: ScanTiles, sizes: Sizes, kernel: str) -> list[ScanTiles]:
    """Return the rows that differ from ``row`` in one field of ``kernel``, or in the chunk, and fit the sizes."""
    if kernel == "chunk":
        made = [row._replace(chunk=chunk) for chunk in (row.chunk // 2, row.chunk * 2)]
        return [each for each in made if fits(each, sizes)]
    tile: Tile = getattr(row, kernel)
    tiles = []
    for field in ("tokens", "rows", "columns"):
        value = getattr(tile, field)
        tiles += [tile._replace(**{field: value // 2}), tile._replace(**{field: value * 2})] if value > 1 else []
    tiles += [tile._replace(warps=warps) for warps in (tile.warps // 2, tile.warps * 2) if 1 <= warps <= 8]
    tiles += [tile._replace(stages=stages) for stages in (tile.stages - 1, tile.stages + 1) if 1 <= stages <= 5]
    return [each for each in (row._replace(**{kernel: tile}) for tile in tiles) if fits(each, sizes)]


def fits(row: ScanTiles, sizes: Sizes) -> bool:
    """Return whether every tile divides what it covers, as the launches require."""
    d_head, d_state = sizes
    products = (row.chunk_state, row.chunk_scan)
    return (
        all(min(tile.tokens, tile.rows, tile.columns) >= LEAST for tile in products)
        and all(row.chunk % tile.tokens == 0 for tile in products)
        and all(d_head % tile.rows == 0 and d_state % tile.columns == 0 for tile in products)
        and (d_head * d_state) % row.state_passing.rows == 0
        and d_head % row.decode.rows == 0
        and row.decode.columns == d_state
    )


@contextmanager
def used(sizes: Sizes, row: ScanTiles, device: str) -> Iterator[None]:
    """Let every launch take ``row`` for ``sizes``, and put the tables back."""
    name = clock.device_name(device)
    before, measured = TILES.get(sizes), MEASURED.get(name, {}).pop(sizes, None)
    TILES[sizes] = row
    try:
        yield
    finally:
        if before is None:
            del TILES[sizes]
        else:
            TILES[sizes] = before
        if measured is not None:
            MEASURED[name][sizes] = measured


def measure(shape: Shape, row: ScanTiles, kernel: str, *, device: str) -> float | str:
    """Return the seconds of the call that has ``kernel``, or why the row is not valid."""
    dry = device == "cpu"
    if kernel == "decode":
        batch, tokens = DRY_DECODE if dry else DECODE
    else:
        batch, tokens = DRY_PREFILL if dry else PREFILL
    case = Case("ssm_scan", shape, batch, tokens)
    with used((shape.d_head, shape.d_state), row, device):
        right, failed = checked(case, {"h1export": lambda: contenders.own("ssm_scan")}, device, name=case.name)
        if not right:
            return failed[0].detail
        inputs = [case.inputs(device, seed) for seed in range(1 if dry else 4)]
        calls = [bound_call(right["h1export"], each) for each in inputs]
        return clock.interleaved({"ours": calls}, device, rounds=1 if dry else 9)["ours"].median


def best_row(shape: Shape, device: str, *, end: float, limit: int | None = None) -> tuple[ScanTiles, dict[str, int]]:
    """Return the fastest row found before ``end``, and how many candidates were timed and refused.

    Args:
        shape: the model's sizes.
        device: "cuda" or "cpu".
        end: the value of time.monotonic() after which the search stops.
        limit: how many candidates of each kernel are tried; None for all.
    """
    sizes = (shape.d_head, shape.d_state)
    best = tiles_for(*sizes, clock.device_name(device))
    counts = {"timed": 0, "refused": 0}
    for kernel in ("chunk_scan", "chunk_state", "state_passing", "chunk", "decode"):
        least = measure(shape, best, kernel, device=device)
        if isinstance(least, str):
            raise RuntimeError(f"the present row: {least}")
        tried = 0
        for candidates in (first, neighbours):
            for row in candidates(best, sizes, kernel):
                if time.monotonic() > end:
                    return best, counts
                if tried == limit:
                    break
                tried += 1
                found = measure(shape, row, kernel, device=device)
                counts["refused" if isinstance(found, str) else "timed"] += 1
                if isinstance(found, float) and found < GAIN * least:
                    best, least = row, found
    return best, counts


def literal(measured: Mapping[str, Mapping[Sizes, ScanTiles]]) -> str:
    """Return the source of MEASURED."""

    def tile(value: Tile) -> str:
        return f"Tile({', '.join(map(str, value))})"

    lines = ["MEASURED: dict[str, dict[tuple[int, int], ScanTiles]] = {"]
    for name, rows in sorted(measured.items()):
        lines.append(f"    {ascii_string(name)}: {{")
        for sizes, row in sorted(rows.items()):
            tiles = ", ".join(tile(value) for value in row[1:])
            lines += [f"        {sizes}: ScanTiles(", f"            {row.chunk}, {tiles}", "        ),"]
        lines.append("    },")
    return "\n".join([*lines, "}"]) if measured else lines[0] + "}"


def ascii_string(text: str) -> str:
    """Return a string literal in double quotes."""
    return '"' + ascii(text)[1:-1].replace('"', '\\"') + '"'


def with_measured(source: str, measured: Mapping[str, Mapping[Sizes, ScanTiles]]) -> str:
    """Return the source of tiles.py with its MEASURED replaced."""
    (node,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "MEASURED"
    )
    lines = source.splitlines()
    lines[node.lineno - 1 : node.end_lineno] = literal(measured).splitlines()
    return "\n".join(lines) + "\n"


def run(device: str, *, budget: float, limit: int | None = None) -> Iterator[tuple[Row, Sizes, ScanTiles | None]]:
    """Yield a row for every head dim and state size of the published shapes, with the tiles found."""
    end = time.monotonic() + budget
    shapes = [DRY] if device == "cpu" else list({(s.d_head, s.d_state): s for s in PUBLISHED}.values())
    for number, shape in enumerate(shapes):
        sizes = (shape.d_head, shape.d_state)
        own_end = time.monotonic() + max(end - time.monotonic(), 0) / (len(shapes) - number)
        try:
            best, counts = best_row(shape, device, end=own_end, limit=limit)
        except Exception as why:  # one shape must not end the search
            yield Row(f"tiles {sizes}", False, detail=f"{type(why).__name__}: {first_line(why)}"), sizes, None
            continue
        figures = counts | {"changed": int(best != tiles_for(*sizes, clock.device_name(device))), "tiles": str(best)}
        yield Row(f"tiles {sizes}", None, figures, "dry run: no figure" if device == "cpu" else ""), sizes, best


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds of the whole search")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--write", action="store_true", help="write the rows to plugins/ssm_scan/tiles.py")
    args = parser.parse_args()
    device = results.device()
    found: dict[Sizes, ScanTiles] = {}

    def rows() -> Iterator[Row]:
        for row, sizes, best in run(device, budget=args.budget):
            if best is not None:
                found[sizes] = best
            yield row

    results.report(rows(), device, path=args.json)
    if args.write and device != "cpu" and found:
        name = clock.device_name(device)
        path = Path(table.__file__)
        measured = MEASURED | {name: MEASURED.get(name, {}) | found}
        path.write_text(with_measured(path.read_text(encoding="utf-8"), measured), encoding="utf-8")


if __name__ == "__main__":
    main()
