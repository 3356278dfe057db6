"""h1::ssm_scan on a GPU: which kernels one call launches, on which grids, with which arguments and workspace.

The kernels are in kernels.py, their tiles in tiles.py. A plugin of a runtime packs the same launches; tests compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from h1export.errors import H1ExportError
from h1export.plugins.gpu.kernel import DTYPES, Kernel, Launch, arguments, run
from h1export.plugins.ssm_scan.tiles import TILES, Tile, Tiles

OP = "ssm_scan"
CHUNK_STATE = arguments(
    "x:*dtype dt:*dtype A:*fp32 B:*dtype dt_bias:*fp32 mask:*dtype T:i32 H:i32 G:i32 dt_min:fp32 dt_max:fp32 local:*fp32 total:*fp32"
)
STATE_PASSING = arguments("local:*fp32 total:*fp32 state:*fp32 chunks:i32 entry:*dtype new_state:*fp32")
CHUNK_SCAN = arguments(
    "x:*dtype dt:*dtype A:*fp32 B:*dtype C:*dtype D:*fp32 dt_bias:*fp32 mask:*dtype entry:*dtype T:i32 H:i32 G:i32 "
    "dt_min:fp32 dt_max:fp32 y:*dtype"
)
DECODE = arguments(
    "x:*dtype dt:*dtype A:*fp32 B:*dtype C:*dtype D:*fp32 dt_bias:*fp32 state:*fp32 mask:*dtype H:i32 G:i32 "
    "dt_min:fp32 dt_max:fp32 y:*dtype new_state:*fp32"
)


@dataclass(frozen=True)
class Problem:
    """The sizes of one call; ``dtype`` of x, dt, B, C, mask and y, as Triton calls it."""

    batch: int
    tokens: int
    heads: int
    groups: int
    d_head: int
    d_state: int
    dtype: str
    dt_min: float
    dt_max: float

    @property
    def tiles(self) -> Tiles:
        """Raises H1ExportError where tiles.py has none."""
        tiles = TILES.get((self.d_head, self.d_state))
        if tiles is None:
            what = f"no GPU kernel for head dim {self.d_head} and state size {self.d_state}"
            raise H1ExportError(
                OP,
                what,
                f"available are {', '.join(f'{p} x {n}' for p, n in TILES)}: add a row to plugins/ssm_scan/tiles.py",
            )
        return tiles

    @property
    def chunks(self) -> int:
        """Of a prompt."""
        return -(-self.tokens // self.tiles.chunk)

    def workspace(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of what the kernels pass to each other; nothing for one token."""
        if self.tokens == 1:
            return {}
        rows = (self.batch, self.heads, self.chunks)
        state = (self.d_head, self.d_state)
        own = next(dtype for dtype, name in DTYPES.items() if name == self.dtype)
        return {
            "local": ((*rows, *state), torch.float32),
            "total": (rows, torch.float32),
            "entry": ((*rows, *state), own),
        }


def launches(problem: Problem) -> tuple[Launch, ...]:
    """One kernel for one token, three otherwise.

    Raises:
        H1ExportError: no kernel for the head dim and state size.
    """
    rows = problem.batch * problem.heads
    state = problem.d_head * problem.d_state
    values = {
        "T": problem.tokens,
        "H": problem.heads,
        "G": problem.groups,
        "dt_min": problem.dt_min,
        "dt_max": problem.dt_max,
    }
    by_name = {kernel.name: kernel for kernel in kernels(problem.d_head, problem.d_state, problem.dtype)}
    tiles = problem.tiles
    if problem.tokens == 1:
        grids = {"decode": (problem.d_head // tiles.decode.rows, rows, 1)}
    else:
        chunks = values["chunks"] = problem.chunks
        chunk_state = tiles.chunk_state
        chunk_scan = tiles.chunk_scan
        state_tiles = problem.d_head // chunk_state.rows * (problem.d_state // chunk_state.columns)
        grids = {
            "chunk_state": (state_tiles, chunks, rows),
            "state_passing": (state // tiles.state_passing.rows, rows, 1),
            "chunk_scan": (tiles.chunk // chunk_scan.tokens * (problem.d_head // chunk_scan.rows), chunks, rows),
        }
    return tuple(
        Launch(by_name[name], grid, tuple(values.get(argument, argument) for argument, _ in by_name[name].arguments))
        for name, grid in grids.items()
    )


def kernels(d_head: int, d_state: int, dtype: str) -> tuple[Kernel, ...]:
    """All kernels of a head dim, a state size and a dtype."""
    tiles = Problem(1, 1, 1, groups=1, d_head=d_head, d_state=d_state, dtype=dtype, dt_min=0, dt_max=0).tiles
    sizes = (("P", d_head), ("N", d_state))

    def of(name: str, taken: tuple[tuple[str, str], ...], tile: Tile, *constants: tuple[str, int]) -> Kernel:
        return Kernel(
            OP, name, dtype, arguments=taken, constants=(*sizes, *constants), warps=tile.warps, stages=tile.stages
        )

    def chunked(tile: Tile) -> tuple[tuple[str, int], ...]:
        return ("Q", tiles.chunk), ("BT", tile.tokens), ("BP", tile.rows), ("BN", tile.columns)

    return (
        of("chunk_state", CHUNK_STATE, tiles.chunk_state, *chunked(tiles.chunk_state)),
        of("state_passing", STATE_PASSING, tiles.state_passing, ("BS", tiles.state_passing.rows)),
        of("chunk_scan", CHUNK_SCAN, tiles.chunk_scan, *chunked(tiles.chunk_scan)),
        of("decode", DECODE, tiles.decode, ("BP", tiles.decode.rows)),
    )


def ssm_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    mask: Tensor,
    dt_min: float,
    dt_max: float,
    new_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """op.py's function by these kernels; mask has x's dtype. ``new_state``: memory for the state, which may be ``state`` itself."""
    batch, tokens, heads, d_head = x.shape
    problem = Problem(
        batch,
        tokens,
        heads,
        groups=B.shape[2],
        d_head=d_head,
        d_state=B.shape[3],
        dtype=DTYPES[x.dtype],
        dt_min=dt_min,
        dt_max=dt_max,
    )
    y = torch.empty_like(x)
    after = torch.empty_like(state) if new_state is None else new_state
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias, "state": state, "mask": mask}
    tensors |= {name: x.new_empty(shape, dtype=dtype) for name, (shape, dtype) in problem.workspace().items()}
    run(launches(problem), tensors | {"y": y, "new_state": after})
    return y, after
