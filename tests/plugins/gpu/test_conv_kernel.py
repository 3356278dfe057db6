"""The GPU kernel of h1::causal_conv against its definition in float64, under Triton's interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from h1export.plugins.causal_conv.launch import causal_conv

pytestmark = pytest.mark.trt

Inputs = dict[str, Any]
Array = npt.NDArray[np.float64]

CPU = torch.device("cpu")
TOLERANCE = 2e-6  # five products and a SiLU, each rounded to float32's 6e-8
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FAULT = 1e-2  # what a wrong kernel must exceed


def by_definition(inputs: Inputs) -> tuple[Array, Array, Array]:
    """Return y, the state after x, and the magnitude of y's terms before they cancel."""
    x, state, weight = (inputs[name].double().numpy() for name in ("x", "state", "weight"))
    bias = np.zeros(x.shape[2]) if inputs["bias"] is None else inputs["bias"].double().numpy()
    taps = weight.shape[2]
    xs = np.concatenate([state.swapaxes(1, 2), x], axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(xs, taps, axis=1)
    total = (windows * weight[:, 0]).sum(-1) + bias
    size = np.abs(windows * weight[:, 0]).sum(-1) + np.abs(bias)
    return total / (1 + np.exp(-total)), xs[:, -(taps - 1) :].swapaxes(1, 2), size


def convolved(inputs: Inputs, in_place: bool = False, device: torch.device = CPU) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y and the state by the kernel on ``device``; the input tensors stay unchanged."""
    held = {name: None if value is None else value.to(device, copy=True) for name, value in inputs.items()}
    y, after = causal_conv(**held, new_state=held["state"] if in_place else None)
    assert (after is held["state"]) == in_place
    return y.cpu(), after.cpu()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    "case",
    [
        {"seq": 1},
        {"seq": 2, "bias": False},
        {"seq": 3},
        {"seq": 17, "pads": (4,)},
        {"seq": 65, "channels": 200},
        {"seq": 5, "taps": 2},
        {"seq": 4, "taps": 6},
    ],
    ids=str,
)
def test_is_the_definition(
    case: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    conv_inputs: Callable[..., Inputs],
    error: Callable[..., float],
) -> None:
    """y only has the error of its own rounding; the state is a copy of inputs."""
    inputs = conv_inputs(**{"channels": 40} | case, dtype=dtype)
    y64, state64, size = by_definition(inputs)
    for in_place in (False, True):
        y, state = convolved(inputs, in_place, device)
        assert error(y, y64, size) < TOLERANCE + ROUNDING[dtype]
        assert np.array_equal(state.double().numpy(), state64)


def test_pieces_chained_by_their_states_are_the_whole(conv_inputs: Callable[..., Inputs]) -> None:
    inputs = conv_inputs(seq=23, channels=40)
    whole, after = convolved(inputs)
    state = inputs["state"]
    outputs = []
    for tokens in (slice(0, 2), slice(2, 19), slice(19, 20), slice(20, 23)):
        y, state = convolved(inputs | {"x": inputs["x"][:, tokens].contiguous(), "state": state}, in_place=True)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.equal(state, after)


FAULTS: dict[str, Callable[[Inputs], Inputs]] = {
    "taps reversed": lambda i: {"weight": i["weight"].flip(2).contiguous()},
    "no bias": lambda i: {"bias": None},
    "incoming state lost": lambda i: {"state": torch.zeros_like(i["state"])},
    "state newest first": lambda i: {"state": i["state"].flip(2).contiguous()},
    "another channel's weight": lambda i: {"weight": i["weight"].roll(1, 0)},
}


@pytest.mark.parametrize("seq", [1, 9])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_input_would_be_seen(
    fault: str, seq: int, conv_inputs: Callable[..., Inputs], error: Callable[..., float]
) -> None:
    inputs = conv_inputs(seq=seq, channels=40)
    y, _ = convolved(inputs | FAULTS[fault](inputs))
    y64, _, size = by_definition(inputs)
    assert error(y, y64, size) > FAULT
