"""The tile sizes of the GPU kernels of h1::ssm_scan, one row per head dim and state size, the same for every GPU.

The tiles were chosen by the compiler's reports for every architecture and both 16-bit dtypes: almost no spills, and
many resident warps. The chunk is the one that the roofline estimates favour on most GPUs. docs/kernels.md has the
figures of both; no GPU has timed them.
"""

from __future__ import annotations

from typing import NamedTuple


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
