"""The GPU kernels of h1::ssm_scan against its recurrence in float64.

All cases run under Triton's interpreter, the main ones also on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from h1export.errors import H1ExportError
from h1export.plugins.gpu.kernel import DTYPES, run
from h1export.plugins.ssm_scan.launch import Problem, launches, ssm_scan
from h1export.plugins.ssm_scan.tiles import TILES, ScanTiles, Tile

pytestmark = pytest.mark.trt

Inputs = dict[str, Any]
Array = npt.NDArray[np.float64]
Recurrence = Callable[..., tuple[Array, Array]]

TOLERANCE = 3e-6  # some dozens of roundings at float32's 6e-8
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FAULT = 1e-2  # what a wrong kernel must exceed, ten times what bfloat16 may

# several chunks, of several tiles, from few tokens
SMALL = ScanTiles(64, Tile(32, 32, 32, 4, 2), Tile(1, 1024, 1, 4, 2), Tile(32, 32, 32, 4, 2), Tile(1, 16, 64, 4, 1))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TILES, (32, 64), SMALL)


CPU = torch.device("cpu")


def scanned(inputs: Inputs, in_place: bool = False, device: torch.device = CPU) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y and the state by the kernels on ``device``; the input tensors stay unchanged."""
    held = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
        if name != "chunk_size"
    }
    held |= {"mask": held["mask"].to(inputs["x"].dtype), "state": held["state"].clone()}
    y, state = ssm_scan(**held, new_state=held["state"] if in_place else None)
    assert (state is held["state"]) == in_place
    assert in_place or torch.equal(held["state"].cpu(), inputs["state"])
    assert (y.dtype, state.dtype) == (inputs["x"].dtype, torch.float32)
    return y.cpu(), state.cpu()


def check(
    inputs: Inputs, y: torch.Tensor, state: torch.Tensor, recurrence: Recurrence, error: Callable[..., float]
) -> None:
    """y and its operands are rounded once each; the terms of the state have an error of the square of a rounding."""
    rounding = ROUNDING[inputs["x"].dtype]
    (y64, state64) = recurrence(inputs)
    (y_size, state_size) = recurrence(inputs, absolute=True)
    assert error(y, y64, y_size) < TOLERANCE + 2 * rounding
    assert error(state, state64, state_size) < TOLERANCE + rounding**2


CASES: list[dict[str, Any]] = [
    {"seq": 1},
    {"seq": 63, "pads": (5,)},
    {"seq": 64, "limits": (0.02, 0.3)},
    {"seq": 65, "groups": 1, "heads_per_group": 2},
    {"seq": 200, "batch": 2, "pads": (70, 1)},
]
SHAPE = {"batch": 1, "groups": 2, "heads_per_group": 1, "d_head": 32, "d_state": 64}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"T{case['seq']}")
@pytest.mark.usefixtures("small_tiles")
def test_is_the_recurrence(
    case: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    scan_inputs: Callable[..., Inputs],
    recurrence: Recurrence,
    error: Callable[..., float],
) -> None:
    inputs = scan_inputs(**SHAPE | case, dtype=dtype)
    check(inputs, *scanned(inputs, device=device), recurrence, error)


@pytest.mark.parametrize(("d_head", "d_state", "seq"), [(*sizes, seq) for sizes in TILES for seq in (1, 129)])
def test_every_row_of_the_table(
    d_head: int,
    d_state: int,
    seq: int,
    device: torch.device,
    scan_inputs: Callable[..., Inputs],
    recurrence: Recurrence,
    error: Callable[..., float],
) -> None:
    """The kernels are right with the tiles that are shipped.

    129 tokens end in a ragged tile, which is in a second chunk where chunks have 128 tokens.
    """
    inputs = scan_inputs(1, seq, 1, 1, d_head, d_state, dtype=torch.float16)
    check(inputs, *scanned(inputs, device=device), recurrence, error)


@pytest.mark.parametrize("seq", [1, 65])
@pytest.mark.usefixtures("small_tiles")
def test_a_state_in_place_is_the_state_beside(
    seq: int, device: torch.device, scan_inputs: Callable[..., Inputs]
) -> None:
    inputs = scan_inputs(**SHAPE | {"seq": seq, "pads": (3,)}, dtype=torch.float16)
    for beside, in_place in zip(
        scanned(inputs, device=device), scanned(inputs, in_place=True, device=device), strict=True
    ):
        assert torch.equal(beside, in_place)


@pytest.mark.usefixtures("small_tiles")
def test_each_kernel_alone(
    scan_inputs: Callable[..., Inputs], recurrence: Recurrence, error: Callable[..., float]
) -> None:
    """The tensors between the three kernels are right for 150 tokens in chunks of 64."""
    inputs = scan_inputs(**SHAPE | {"seq": 150, "pads": (9,)})
    problem = Problem(
        1,
        150,
        2,
        groups=2,
        d_head=32,
        d_state=64,
        dtype=DTYPES[torch.float32],
        dt_min=inputs["dt_min"],
        dt_max=inputs["dt_max"],
    )
    tensors = {name: torch.full(shape, math.nan, dtype=dtype) for name, (shape, dtype) in problem.workspace().items()}
    tensors |= {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    tensors |= {"y": torch.full_like(inputs["x"], math.nan), "new_state": torch.full_like(inputs["state"], math.nan)}
    chunk_state, state_passing, chunk_scan = launches(problem)

    run([chunk_state], tensors)
    steps = torch.nn.functional.softplus(inputs["dt"].double() + inputs["dt_bias"].double()) * inputs["mask"][..., None]
    for chunk, tokens in enumerate((slice(0, 64), slice(64, 128), slice(128, 150))):
        cut = {name: inputs[name][:, tokens] for name in ("x", "dt", "B", "C", "mask")}
        alone = inputs | cut | {"state": torch.zeros_like(inputs["state"])}
        size = recurrence(alone, absolute=True)[1]
        assert error(tensors["local"][:, :, chunk], recurrence(alone)[1], size) < TOLERANCE
        decay = (steps[:, tokens] * inputs["A"].double()).sum(1)
        assert error(tensors["total"][:, :, chunk], decay.numpy()) < TOLERANCE
    assert tensors["y"].isnan().all()

    run([state_passing], tensors)
    for chunk, end in enumerate((0, 64, 128)):
        before = inputs | {name: inputs[name][:, :end] for name in ("x", "dt", "B", "C", "mask")}
        assert (
            error(tensors["entry"][:, :, chunk], recurrence(before)[1], recurrence(before, absolute=True)[1])
            < TOLERANCE
        )
    assert error(tensors["new_state"], recurrence(inputs)[1], recurrence(inputs, absolute=True)[1]) < TOLERANCE

    run([chunk_scan], tensors)
    assert error(tensors["y"], recurrence(inputs)[0], recurrence(inputs, absolute=True)[0]) < TOLERANCE


@pytest.mark.parametrize("seq", [1, 70])
@pytest.mark.usefixtures("small_tiles")
def test_a_row_of_pads_keeps_its_state_bit_for_bit(seq: int, scan_inputs: Callable[..., Inputs]) -> None:
    """Pads leave the state unchanged even if the lower limit would give every token a dt."""
    inputs = scan_inputs(
        **SHAPE | {"seq": seq, "batch": 2}, pads=(seq, 0), limits=(0.05, math.inf), dtype=torch.bfloat16
    )
    y, state = scanned(inputs)
    assert torch.equal(state[0], inputs["state"][0])
    assert not torch.equal(state[1], inputs["state"][1])
    assert y.isfinite().all()


@pytest.mark.usefixtures("small_tiles")
def test_pieces_chained_by_their_states_are_the_whole(
    scan_inputs: Callable[..., Inputs], recurrence: Recurrence, error: Callable[..., float]
) -> None:
    inputs = scan_inputs(**SHAPE | {"seq": 80})
    state = inputs["state"]
    outputs = []
    for tokens in (slice(0, 70), slice(70, 71), slice(71, 80)):
        part = {name: inputs[name][:, tokens].contiguous() for name in ("x", "dt", "B", "C", "mask")}
        y, state = scanned(inputs | part | {"state": state})
        outputs.append(y)
    check(inputs, torch.cat(outputs, dim=1), state, recurrence, error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("small_tiles")
def test_the_steps_of_slow_heads_are_not_lost(
    dtype: torch.dtype, scan_inputs: Callable[..., Inputs], recurrence: Recurrence, error: Callable[..., float]
) -> None:
    """Each head is right in its own range, from a zero state, for softplus(bias) from 1e-6 (subnormal in fp16)."""
    inputs = scan_inputs(1, 100, 1, 4, 32, 64, dtype=dtype)
    bias = torch.log(torch.expm1(torch.tensor([1e-6, 1e-4, 1e-2, 1.0], dtype=torch.float64))).float()
    inputs |= {
        "dt": inputs["dt"] * 0.1,
        "dt_bias": bias,
        "A": -torch.ones(4),
        "state": torch.zeros_like(inputs["state"]),
    }
    _, state = scanned(inputs)
    expected = recurrence(inputs)[1]
    size = recurrence(inputs, absolute=True)[1]
    for head in range(4):
        assert error(state[:, head], expected[:, head], size[:, head]) < TOLERANCE + ROUNDING[dtype] ** 2


FAULTS: dict[str, Callable[[Inputs], Inputs]] = {
    "B and C swapped": lambda i: {"B": i["C"], "C": i["B"]},
    "groups swapped": lambda i: {"B": i["B"].flip(2).contiguous(), "C": i["C"].flip(2).contiguous()},
    "another head's decay": lambda i: {"A": i["A"].roll(1)},
    "no skip": lambda i: {"D": torch.zeros_like(i["D"])},
    "no dt bias": lambda i: {"dt_bias": torch.zeros_like(i["dt_bias"])},
    "no lower limit": lambda i: {"dt_min": 0.0},
    "no upper limit": lambda i: {"dt_max": math.inf},
    "mask ignored": lambda i: {"mask": torch.ones_like(i["mask"])},
    "incoming state lost": lambda i: {"state": torch.zeros_like(i["state"])},
}


@pytest.mark.parametrize("seq", [1, 33])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.usefixtures("small_tiles")
def test_a_wrong_input_would_be_seen(
    fault: str, seq: int, scan_inputs: Callable[..., Inputs], recurrence: Recurrence, error: Callable[..., float]
) -> None:
    """A wrong kernel exceeds FAULT in y or in the state."""
    inputs = scan_inputs(**SHAPE | {"seq": seq, "batch": 2, "pads": (1,)}, limits=(0.05, 0.1))
    y, state = scanned(inputs | FAULTS[fault](inputs))
    (y64, state64) = recurrence(inputs)
    (y_size, state_size) = recurrence(inputs, absolute=True)
    assert max(error(y, y64, y_size), error(state, state64, state_size)) > FAULT


def test_a_shape_without_a_kernel_is_refused(scan_inputs: Callable[..., Inputs]) -> None:
    with pytest.raises(H1ExportError, match="no GPU kernel for head dim 48 and state size 64"):
        scanned(scan_inputs(1, 1, 1, 1, 48, 64))


def test_a_tensor_of_another_dtype_or_layout_is_refused(scan_inputs: Callable[..., Inputs]) -> None:
    inputs = scan_inputs(1, 2, 1, 1, 32, 64, dtype=torch.float16)
    with pytest.raises(H1ExportError, match=r"B is torch\.float32"):
        scanned(inputs | {"B": inputs["B"].float()})
    with pytest.raises(H1ExportError, match="contiguous"):
        scanned(inputs | {"x": inputs["x"].transpose(1, 2)[:, :, :2].expand(1, 2, 2, 32)[:, :, :1]})
