"""A GPU that is pretended on a CPU: tensors that claim to be on it, and operations that refuse any other tensor.

As on a GPU, an operation on tensors of two devices fails, except for CPU tensors of no dimensions, and a tensor has to
be moved to the CPU before NumPy sees it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from h1export.quantize.device import ComputeDevice

PLACE = torch.device("cuda", 0)


class OnGpu(torch.Tensor):
    """A CPU tensor, ``held``, that claims to be on PLACE."""

    held: torch.Tensor
    device = property(lambda _: PLACE)  # type: ignore[assignment]  # torch itself asks for "meta", which needs no driver

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


def dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU; its results are on PLACE where its arguments, or the device it names, are."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [leaf for leaf in tensors if isinstance(leaf, OnGpu)]
    named = kwargs.get("device")
    moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    others = [leaf for leaf in tensors if not isinstance(leaf, OnGpu) and leaf.dim()]
    assert not (ours and others) or moves, f"{func} has tensors on two devices"
    on_gpu = bool(ours) if named is None else torch.device(named).type == PLACE.type
    if named is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    held_args, held_kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, OnGpu) else leaf, (args, kwargs))
    found = func(*held_args, **held_kwargs)
    known = {id(leaf.held): leaf for leaf in ours}  # what is changed in place stays the same tensor

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not on_gpu:
            return leaf
        return known[id(leaf)] if id(leaf) in known else OnGpu(leaf)

    return tree_map(wrapped, found)


class Factories(TorchFunctionMode):
    """Make what is created on PLACE, or moved there, a tensor that claims to be there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to and args[1] == PLACE:
            return args[0] if isinstance(args[0], OnGpu) else OnGpu(args[0].detach().clone())
        if kwargs.get("device") == PLACE:
            return OnGpu(func(*args, **{**kwargs, "device": torch.device("cpu")}))
        return func(*args, **kwargs)


@dataclass(frozen=True)
class PretendedGpu(ComputeDevice):
    """PLACE; nothing asks CUDA's driver for it."""

    @contextmanager
    def computing(self) -> Iterator[None]:
        with Factories():
            yield


PRETENDED = PretendedGpu(PLACE, "pretended")
