"""The tile sizes of the GPU kernels of h1::ssm_scan, by head dim and state size.

TILES serves every GPU. Its rows were chosen by the compiler's reports for every architecture and both 16-bit dtypes:
almost no spills, and many resident warps. The chunk is the one that the roofline estimates favour on most GPUs.
docs/kernels.md has the figures of both; no GPU has timed them.

MEASURED has the rows that were timed, by the GPU that timed them. A call on that GPU takes them instead. The TensorRT
plugin takes TILES, because its machine code also runs on other GPUs of the same architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from h1export.errors import H1ExportError


class Tile(NamedTuple):
    """The part of a problem that one program covers.

    Attributes:
        tokens: tokens.
        rows: channels of a head; for state_passing, elements of the state.
        columns: elements of d_state that one step of the inner loop covers.
        warps: the warps of the program.
        stages: the stages of Triton's software pipelining.
    """

    tokens: int
    rows: int
    columns: int
    warps: int
    stages: int


class ScanTiles(NamedTuple):
    """The tokens of a chunk, a multiple of the tokens of every tile, and the tile of each kernel."""

    chunk: int
    chunk_state: Tile
    state_passing: Tile
    chunk_scan: Tile
    decode: Tile


TILES: dict[tuple[int, int], ScanTiles] = {
    (32, 64): ScanTiles(
        128, Tile(32, 32, 64, 4, 3), Tile(1, 512, 1, 4, 4), Tile(64, 32, 32, 4, 3), Tile(1, 16, 64, 4, 1)
    ),
    (32, 128): ScanTiles(
        128, Tile(32, 32, 64, 4, 3), Tile(1, 512, 1, 4, 4), Tile(64, 32, 32, 4, 3), Tile(1, 8, 128, 4, 1)
    ),
    (32, 256): ScanTiles(
        128, Tile(32, 32, 64, 4, 3), Tile(1, 512, 1, 4, 4), Tile(64, 32, 32, 4, 3), Tile(1, 4, 256, 4, 1)
    ),
    (64, 64): ScanTiles(
        128, Tile(32, 64, 64, 4, 3), Tile(1, 512, 1, 4, 4), Tile(64, 64, 32, 4, 3), Tile(1, 16, 64, 4, 1)
    ),
    (64, 128): ScanTiles(
        256, Tile(32, 64, 64, 4, 3), Tile(1, 512, 1, 4, 4), Tile(64, 64, 64, 8, 2), Tile(1, 8, 128, 4, 1)
    ),
    (64, 256): ScanTiles(
        256, Tile(32, 64, 64, 4, 3), Tile(1, 1024, 1, 4, 4), Tile(64, 64, 64, 8, 2), Tile(1, 8, 256, 4, 1)
    ),
    (128, 64): ScanTiles(
        128, Tile(32, 64, 64, 4, 3), Tile(1, 512, 1, 4, 4), Tile(64, 64, 32, 4, 3), Tile(1, 16, 64, 4, 1)
    ),
    (128, 128): ScanTiles(
        256, Tile(32, 64, 64, 4, 3), Tile(1, 1024, 1, 4, 4), Tile(64, 64, 64, 8, 2), Tile(1, 8, 128, 4, 1)
    ),
    (128, 256): ScanTiles(
        256, Tile(32, 64, 64, 4, 3), Tile(1, 1024, 1, 4, 4), Tile(64, 64, 64, 8, 2), Tile(1, 8, 256, 4, 1)
    ),
}

# name of the GPU, as torch.cuda.get_device_name() returns it -> its rows, in the form of TILES
MEASURED: dict[str, dict[tuple[int, int], ScanTiles]] = {}


def tiles_for(d_head: int, d_state: int, device_name: str | None = None) -> ScanTiles:
    """Return the tiles for a head dim and a state size: the row that was timed on the GPU, or else that of TILES.

    Args:
        d_head: head dim of the SSM.
        d_state: state size of the SSM.
        device_name: the name of the GPU, as torch.cuda.get_device_name() returns it; None for the row of every GPU.

    Raises:
        H1ExportError: there is no row for these sizes.
    """
    sizes = (d_head, d_state)
    measured: Mapping[tuple[int, int], ScanTiles] = {} if device_name is None else MEASURED.get(device_name, {})
    tiles = measured.get(sizes) or TILES.get(sizes)
    if tiles is None:
        what = f"no GPU kernel for head dim {d_head} and state size {d_state}"
        available = ", ".join(f"{p} x {n}" for p, n in TILES)
        raise H1ExportError("ssm_scan", what, f"available are {available}: add a row to plugins/ssm_scan/tiles.py")
    return tiles
