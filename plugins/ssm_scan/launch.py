"""The launches of h1::ssm_scan on a GPU: the kernels, grids, arguments and workspace of one call.

The kernels are in kernels.py, their tiles in tiles.py. The TensorRT plugin packs the same launches in C++; tests
compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from h1export.plugins.gpu import device
from h1export.plugins.gpu.kernel import DTYPES, Kernel, Launch, arguments, run
from h1export.plugins.ssm_scan.tiles import ScanTiles, Tile, tiles_for

OP = "ssm_scan"
CHUNK_STATE = arguments(
    "x:*dtype dt:*dtype A:*fp32 B:*dtype dt_bias:*fp32 mask:*dtype T:i32 H:i32 G:i32 dt_min:fp32 dt_max:fp32 "
    "local:*fp32 total:*fp32"
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

CONVERTED = ("dt", "mask", "A", "D", "dt_bias")  # to float32 by the kernels


@dataclass(frozen=True)
class Problem:
    """The sizes and limits of one call.

    ``dtype`` is Triton's name ("fp16", "bf16", "fp32") of the dtype that x, dt, B, C, mask and y share.
    ``device_name`` is the GPU whose measured tiles the call takes; None stands for the tiles of every GPU.
    """

    batch: int
    tokens: int
    heads: int
    groups: int
    d_head: int
    d_state: int
    dtype: str
    dt_min: float
    dt_max: float
    device_name: str | None = None

    @property
    def tiles(self) -> ScanTiles:
        """The tiles for the head dim, the state size and the GPU.

        Raises:
            H1ExportError: tiles.py has no row for these sizes.
        """
        return tiles_for(self.d_head, self.d_state, self.device_name)

    @property
    def chunks(self) -> int:
        """The number of chunks that the tokens are cut into."""
        return -(-self.tokens // self.tiles.chunk)

    def workspace(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shape and dtype of each tensor that the kernels pass to each other.

        A call on one token needs none.

        Raises:
            H1ExportError: tiles.py has no row for the head dim and state size.
        """
        if self.tokens == 1:
            return {}
        rows = (self.batch, self.heads, self.chunks)
        state = (self.d_head, self.d_state)
        io_dtype = next(dtype for dtype, name in DTYPES.items() if name == self.dtype)
        return {
            "local": ((*rows, *state), torch.float32),
            "total": (rows, torch.float32),
            "entry": ((*rows, *state), io_dtype),
        }


def launches(problem: Problem) -> tuple[Launch, ...]:
    """Return the launches of one call: one kernel for one token, three otherwise.

    Raises:
        H1ExportError: tiles.py has no row for the head dim and state size.
    """
    return _launches(problem, problem.tiles)


@lru_cache(maxsize=1024)  # a decode step asks for the same launches again and again
def _launches(problem: Problem, tiles: ScanTiles) -> tuple[Launch, ...]:
    rows = problem.batch * problem.heads
    state = problem.d_head * problem.d_state
    values = {
        "T": problem.tokens,
        "H": problem.heads,
        "G": problem.groups,
        "dt_min": problem.dt_min,
        "dt_max": problem.dt_max,
    }
    by_name = {kernel.name: kernel for kernel in _kernels(problem.d_head, problem.d_state, problem.dtype, tiles)}
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


def kernels(d_head: int, d_state: int, dtype: str, *, device_name: str | None = None) -> tuple[Kernel, ...]:
    """Return all four kernels for a head dim, a state size and a dtype by Triton's name.

    ``device_name`` is as in Problem.

    Raises:
        H1ExportError: tiles.py has no row for the head dim and state size.
    """
    return _kernels(d_head, d_state, dtype, tiles_for(d_head, d_state, device_name))


def _kernels(d_head: int, d_state: int, dtype: str, tiles: ScanTiles) -> tuple[Kernel, ...]:
    sizes = (("P", d_head), ("N", d_state))

    def kernel(name: str, signature: tuple[tuple[str, str], ...], tile: Tile, *constants: tuple[str, int]) -> Kernel:
        return Kernel(
            OP,
            name,
            dtype,
            arguments=signature,
            constants=(*sizes, *constants),
            warps=tile.warps,
            stages=tile.stages,
            converted=CONVERTED,
        )

    def chunk_constants(tile: Tile) -> tuple[tuple[str, int], ...]:
        return ("Q", tiles.chunk), ("BT", tile.tokens), ("BP", tile.rows), ("BN", tile.columns)

    return (
        kernel("chunk_state", CHUNK_STATE, tiles.chunk_state, *chunk_constants(tiles.chunk_state)),
        kernel("state_passing", STATE_PASSING, tiles.state_passing, ("BS", tiles.state_passing.rows)),
        kernel("chunk_scan", CHUNK_SCAN, tiles.chunk_scan, *chunk_constants(tiles.chunk_scan)),
        kernel("decode", DECODE, tiles.decode, ("BP", tiles.decode.rows)),
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
    *,
    new_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the op of op.py with the GPU kernels.

    The arguments and results are those of the op, except that the chunk is the one of tiles.py. x, B and C share one
    dtype; dt, mask, A, D and dt_bias may have any of DTYPES.
    ``new_state`` is the tensor to write the new state to, which may be ``state`` itself; None allocates one.

    Raises:
        H1ExportError: Triton is not installed, tiles.py has no row for the head dim and state size, or a tensor is not
            contiguous or has another dtype than its kernel takes.
    """
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
        device_name=device.name(x.device),
    )
    y = torch.empty_like(x)
    state_after = torch.empty_like(state) if new_state is None else new_state
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias, "state": state, "mask": mask}
    tensors |= {name: x.new_empty(shape, dtype=dtype) for name, (shape, dtype) in problem.workspace().items()}
    run(launches(problem), tensors | {"y": y, "new_state": state_after})
    return y, state_after
