"""A GPU kernel as a value: which function of an op's kernels.py, for which dtype and tiles; and one launch of it.

An op's launch.py says what it launches; `run` executes it on torch tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from h1export.errors import H1ExportError
from h1export.plugins.gpu import sdk

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}  # as Triton calls them
OURS = "*dtype"  # in arguments: a pointer to the kernel's own dtype
ALIGNED = 16  # bytes, of pointers; and what divides the integers that Kernel.aligned names


@dataclass(frozen=True)
class Kernel:
    """``arguments``: (name, Triton's type, or OURS) in order; ``constants``: what is fixed when it is compiled, likewise."""

    op: str
    name: str
    dtype: str
    arguments: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int], ...]
    warps: int
    stages: int
    aligned: tuple[str, ...] = ()

    @property
    def symbol(self) -> str:
        """A name for this kernel alone, such as decode_fp16_P64_N128_BP8; the warps and stages belong to the tiles."""
        return "_".join((self.name, self.dtype, *(f"{name}{value}" for name, value in self.constants)))

    @property
    def threads(self) -> int:
        """Of a program."""
        return 32 * self.warps

    def signature(self) -> dict[str, str]:
        """Argument -> Triton's type."""
        return {name: f"*{self.dtype}" if kind == OURS else kind for name, kind in self.arguments}


@dataclass(frozen=True)
class Launch:
    """``values``: what is handed over for each argument of the kernel, a tensor's name or a number."""

    kernel: Kernel
    grid: tuple[int, int, int]
    values: tuple[str | int | float, ...]


def arguments(text: str) -> tuple[tuple[str, str], ...]:
    """("x", "*dtype"), ... from "x:*dtype T:i32 ..."."""
    pairs = (item.split(":") for item in text.split())
    return tuple((name, kind) for name, kind in pairs)


def run(launches: Sequence[Launch], tensors: Mapping[str, torch.Tensor]) -> None:
    """Launch one after the other on contiguous tensors.

    Raises:
        H1ExportError: Triton is not installed, or a tensor is not contiguous or has another dtype than its kernel.
    """
    for launch in launches:
        kernel = launch.kernel
        function: Any = getattr(sdk.kernels(kernel.op), kernel.name)
        values = [tensors[value] if isinstance(value, str) else value for value in launch.values]
        for (name, kind), value in zip(kernel.signature().items(), values, strict=True):
            if isinstance(value, torch.Tensor) and (kind != f"*{DTYPES.get(value.dtype)}" or not value.is_contiguous()):
                what = f"{name} is {value.dtype} with strides {value.stride()}; the kernel takes a contiguous {kind}"
                raise H1ExportError(kernel.symbol, what, "convert it before the call")
        function[launch.grid](*values, **dict(kernel.constants), num_warps=kernel.warps, num_stages=kernel.stages)
