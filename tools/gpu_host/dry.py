"""What a dry run on a CPU needs: a Triton interpreter that computes as a GPU, and whether ONNX Runtime has a kernel."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch

NO_KERNEL = "NOT_IMPLEMENTED"  # ONNX Runtime's status when the provider has no kernel for a node of the graph


def has_no_kernel(error: Exception) -> bool:
    """Return whether ONNX Runtime refused a graph because its provider has no kernel for a node."""
    return NO_KERNEL in str(error)


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Let imports of ``packages`` fail meanwhile, whether or not they were imported before.

    transformers takes mamba-ssm's kernels when it finds them, and calls them on tensors of the CPU too.
    """
    before = {name: sys.modules[name] for name in packages if name in sys.modules}
    sys.modules.update(dict.fromkeys(packages))  # type: ignore[arg-type]  None lets an import fail
    try:
        yield
    finally:
        for name in packages:
            del sys.modules[name]
        sys.modules.update(before)


def use_cpu_provider() -> None:
    """Let this process run CUDA graphs on ONNX Runtime's CPU provider; it has no other use for them."""
    from h1export.targets.onnxruntime import variants

    stand_in = replace(variants.GRAPH_VARIANTS["cuda"], provider=variants.CPU)
    variants.GRAPH_VARIANTS["cuda"] = stand_in  # type: ignore[index]  it is a dict


@contextmanager
def mended_interpreter() -> Iterator[None]:
    """Mend bfloat16 in Triton's interpreter, which holds it as uint16, and the ends of loops in that of Triton 3.6.

    Products multiply the bits as integers, and casts truncate instead of rounding. Triton 3.6 reads the end of a loop
    from an array of one element, which NumPy 2.5 refuses.
    """
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot
    cast = InterpreterBuilder.cast_impl
    patch_tensor = interpreter._patch_lang_tensor

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def wide_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def rounding_cast(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, source, to)
        rounded = torch.from_numpy(np.array(source.data)).bfloat16()
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    def with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    with ExitStack() as stack:
        for owner, name, value in (
            (interpreter, "_patch_lang_tensor", with_index),
            (InterpreterBuilder, "create_dot", wide_dot),
            (InterpreterBuilder, "cast_impl", rounding_cast),
            (InterpreterBuilder, "create_fp_trunc", rounding_cast),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
