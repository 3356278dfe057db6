"""What the tests of the ops' dispatch share: the functions as ops of a CPU, inputs on a device, and the tolerances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from h1export.plugins import h1
from h1export.plugins.causal_conv import dispatch as conv_dispatch
from h1export.plugins.ssm_scan import dispatch as scan_dispatch

Inputs = dict[str, Any]
Edit = Callable[[Inputs], Inputs]

MODULES: dict[str, Any] = {"ssm_scan": scan_dispatch, "causal_conv": conv_dispatch}
# as the kernels' own tests have them: y and its operands are rounded once each, and the state's terms to the square
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TOLERANCE = 5e-6

# The same functions as ops of a CPU, so that PyTorch's own checks see them where there is no GPU.
STAND_INS: dict[str, Any] = {}
for _name, _module in MODULES.items():
    STAND_INS[_name] = torch.library.custom_op(f"h1_test_gpu::{_name}", mutates_args=())(getattr(_module, _name))
STAND_INS["ssm_scan"].register_fake(
    lambda x, dt, A, B, C, D, dt_bias, state, mask, chunk_size, dt_min, dt_max: (
        x.new_empty(x.shape),
        state.new_empty(state.shape, dtype=torch.float32),
    )
)
STAND_INS["causal_conv"].register_fake(
    lambda x, state, weight, bias: (x.new_empty(x.shape), state.new_empty(state.shape))
)


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    """Copies of the inputs on the device, each with the strides, the offset and the memory beside it that it has."""

    def move(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        everything = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (storage.nbytes() // tensor.itemsize,))
        return everything.to(device, copy=True).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return {name: move(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def op_on(op: str, device: torch.device) -> Any:
    """The op itself on a GPU, and the stand-in with the same function on a CPU."""
    return getattr(torch.ops.h1 if device.type == "cuda" else torch.ops.h1_test_gpu, op)


def permuted(*names: str) -> Edit:
    """The tensors with their axes in memory in reverse order."""

    def edit(inputs: Inputs) -> Inputs:
        axes = {name: list(range(inputs[name].ndim))[::-1] for name in names}
        return {name: inputs[name].permute(axes[name]).contiguous().permute(axes[name]) for name in names}

    return edit


def within(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], op: str, *, dtype: torch.dtype) -> None:
    """Outputs equal the references' in the float32 of the same inputs, within the roundings of the outputs' dtype."""
    roundings = (2 * ROUNDING[dtype], ROUNDING[dtype] ** 2 if op == "ssm_scan" else 0.0)
    for got, true, rounding in zip(actual, expected, roundings, strict=True):
        assert got.shape == true.shape
        assert got.is_contiguous()
        # terms may cancel in y: its magnitude is within ten times of its largest value in these inputs
        assert float((got.cpu().float() - true).abs().max()) <= (TOLERANCE + rounding) * 10 * float(true.abs().max())


def exact(op: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """The op on a CPU for the same numbers in float32."""
    return tuple(getattr(h1, op)(**{n: v.float() if isinstance(v, Tensor) else v for n, v in inputs.items()}))
