"""The tiles of the GPU kernels by head dim and state size, one row each, the same for every GPU.

Chosen by what the compiler makes of them on every architecture, at either dtype: next to no spills, many warps at a time. The chunk is
the one that the estimates favour on most GPUs. docs/kernels.md has the figures of both; no GPU has timed them.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """What one program covers. ``rows``: channels of a head (state_passing: elements of the state); ``columns``: d_state at a time."""

    tokens: int
    rows: int
    columns: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """``chunk``: tokens, a multiple of the tiles' tokens; then a tile for each kernel."""

    chunk: int
    chunk_state: Tile
    state_passing: Tile
    chunk_scan: Tile
    decode: Tile


TILES: dict[tuple[int, int], Tiles] = {
    (32, 64): Tiles(128, Tile(32, 32, 64, 4, 3), Tile(1, 512, 1, 4, 4), Tile(64, 32, 32, 4, 3), Tile(1, 16, 64, 4, 1)),
    (32, 128): Tiles(128, Tile(32, 32, 64, 4, 3), Tile(1, 512, 1, 4, 4), Tile(64, 32, 32, 4, 3), Tile(1, 8, 128, 4, 1)),
    (32, 256): Tiles(128, Tile(32, 32, 64, 4, 3), Tile(1, 512, 1, 4, 4), Tile(64, 32, 32, 4, 3), Tile(1, 4, 256, 4, 1)),
    (64, 64): Tiles(128, Tile(32, 64, 64, 4, 3), Tile(1, 512, 1, 4, 4), Tile(64, 64, 32, 4, 3), Tile(1, 16, 64, 4, 1)),
    (64, 128): Tiles(256, Tile(32, 64, 64, 4, 3), Tile(1, 512, 1, 4, 4), Tile(64, 64, 64, 8, 2), Tile(1, 8, 128, 4, 1)),
    (64, 256): Tiles(
        256, Tile(32, 64, 64, 4, 3), Tile(1, 1024, 1, 4, 4), Tile(64, 64, 64, 8, 2), Tile(1, 8, 256, 4, 1)
    ),
    (128, 64): Tiles(128, Tile(32, 64, 64, 4, 3), Tile(1, 512, 1, 4, 4), Tile(64, 64, 32, 4, 3), Tile(1, 16, 64, 4, 1)),
    (128, 128): Tiles(
        256, Tile(32, 64, 64, 4, 3), Tile(1, 1024, 1, 4, 4), Tile(64, 64, 64, 8, 2), Tile(1, 8, 128, 4, 1)
    ),
    (128, 256): Tiles(
        256, Tile(32, 64, 64, 4, 3), Tile(1, 1024, 1, 4, 4), Tile(64, 64, 64, 8, 2), Tile(1, 8, 256, 4, 1)
    ),
}
