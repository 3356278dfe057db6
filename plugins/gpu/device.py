"""What the kernels have to know of the device that a tensor is on.

A CPU counts as a device that can run them, because Triton's interpreter does.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from h1export.plugins.gpu import sdk

CAPABILITY = (8, 0)  # the lowest compute capability that the kernels are compiled and checked for
GRID_LIMIT = 65535  # programs along a grid's second and third dimension (CUDA C++ Programming Guide)


@cache
def name(device: torch.device) -> str | None:
    """Return the name of the GPU ``device``; None for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def current(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the device of ``tensor`` the current one, because that is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def refusal(device: torch.device) -> str | None:
    """Return why ``device`` cannot run the kernels; None if it can."""
    if not sdk.installed():
        return "Triton is not installed"
    if device.type != "cuda":
        return None
    if torch.version.cuda is None:
        return "the kernels are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"the GPU's compute capability is {capability}, and the kernels need {CAPABILITY}"
    return None


def wrong_tensor(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], device: torch.device
) -> str | None:
    """Return which tensor has another shape than in ``shapes``, or is elsewhere than on ``device``; None if none is."""
    for label, shape in shapes.items():
        tensor = tensors[label]
        if tuple(tensor.shape) != shape:
            return f"{label} has the shape {tuple(tensor.shape)}, and not {shape}"
        if tensor.device != device:
            return f"{label} is on {tensor.device}, and x on {device}"
    return None
