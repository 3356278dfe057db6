"""A GPU kernel as a value (a function of an op's kernels.py, a dtype, its constants), and one launch of it.

The launch.py of an op returns its launches, and `run` executes them on torch tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from h1export.errors import H1ExportError
from h1export.plugins.gpu import device, sdk

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}  # Triton's names
ELEMENTS = {**DTYPES, torch.int32: "i32", torch.int8: "i8"}  # of tensors whose type a kernel states itself
KERNEL_DTYPE = "*dtype"  # in Kernel.arguments: a pointer to elements of Kernel.dtype
ALIGNED = 16  # divides every pointer, in bytes, and the integers that Kernel.aligned names


@dataclass(frozen=True)
class Kernel:
    """A kernel function specialised to a dtype and compile-time constants.

    Attributes:
        op: the op whose kernels.py has the function.
        name: the name of the function.
        dtype: the dtype of x and the tensors like it, by Triton's name ("fp16", "bf16", "fp32").
        arguments: (name, type) in the function's order; a type is Triton's, or KERNEL_DTYPE.
        constants: (name, value) of the compile-time constants, in the function's order.
        warps: the warps of one program.
        stages: the stages of Triton's software pipelining.
        aligned: the integer arguments that are multiples of ALIGNED in every call.
        converted: the tensors that the function converts to float32 itself, so that ``run`` takes them in any of
            DTYPES; code compiled ahead of time takes the type in ``arguments``.
    """

    op: str
    name: str
    dtype: str
    arguments: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int], ...]
    warps: int
    stages: int
    aligned: tuple[str, ...] = ()
    converted: tuple[str, ...] = ()

    @property
    def symbol(self) -> str:
        """The unique name of the kernel, such as decode_fp16_P64_N128_BP8; the tiles determine warps and stages."""
        return "_".join((self.name, self.dtype, *(f"{name}{value}" for name, value in self.constants)))

    @property
    def threads(self) -> int:
        """The threads of one program."""
        return 32 * self.warps

    def signature(self) -> dict[str, str]:
        """Return Triton's type of each argument."""
        return {name: f"*{self.dtype}" if kind == KERNEL_DTYPE else kind for name, kind in self.arguments}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: the kernel.
        grid: the number of programs along each dimension.
        values: the value of each argument of the kernel: a number, or the name of a tensor.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    values: tuple[str | int | float, ...]


def arguments(text: str) -> tuple[tuple[str, str], ...]:
    """Parse "x:*dtype T:i32 ..." to (("x", "*dtype"), ("T", "i32"), ...)."""
    pairs = (item.split(":") for item in text.split())
    return tuple((name, kind) for name, kind in pairs)


def run(launches: Sequence[Launch], tensors: Mapping[str, torch.Tensor]) -> None:
    """Launch the kernels one after the other on contiguous tensors, which ``tensors`` has by name.

    Raises:
        H1ExportError: Triton is not installed, or a tensor is not contiguous or has another dtype than its kernel.
    """
    for launch in launches:
        kernel = launch.kernel
        function: Any = getattr(sdk.kernels(kernel.op), kernel.name)
        values = [tensors[value] if isinstance(value, str) else value for value in launch.values]
        for (name, kind), value in zip(kernel.signature().items(), values, strict=True):
            if not isinstance(value, torch.Tensor):
                continue
            right = value.dtype in DTYPES if name in kernel.converted else kind == f"*{ELEMENTS.get(value.dtype)}"
            if not right or not value.is_contiguous():
                what = f"{name} is {value.dtype} with strides {value.stride()}; the kernel takes a contiguous {kind}"
                raise H1ExportError(kernel.symbol, what, "convert it before the call")
        with device.current(next(value for value in values if isinstance(value, torch.Tensor))):
            function[launch.grid](*values, **dict(kernel.constants), num_warps=kernel.warps, num_stages=kernel.stages)
