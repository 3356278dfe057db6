"""The ops' dispatch inside PyTorch: opcheck, torch.compile, CUDA graphs, and what importing the ops imports.

As in test_dispatch.py, a CPU runs the same functions over Triton's interpreter, and a GPU the ops.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_dispatch import MODULES, ROUNDING, Inputs, exact, moved, op_on, permuted, within
from torch import Tensor
from torch.library import opcheck

from h1export.plugins import h1
from h1export.plugins.attention import op as attention_op

pytestmark = pytest.mark.trt

Make = Callable[..., Inputs]


@pytest.mark.parametrize("op", MODULES)
@pytest.mark.parametrize("seq", [1, 9])
def test_opcheck(op: str, seq: int, device: torch.device, make: Make) -> None:
    """PyTorch's own checks of the schema, aliases, strides of the fake results, and dynamic sizes."""
    for edit in (lambda _: {}, permuted("x", "state")):
        inputs = make(op, seq=seq)
        opcheck(op_on(op, device).default, (), moved(inputs | edit(inputs), device))


class Call(torch.nn.Module):
    """A module that calls an op between two products, as a model does."""

    def __init__(self, op: Any) -> None:
        super().__init__()
        self.op = op

    def forward(self, inputs: Inputs) -> Tensor:
        y, state = self.op(**inputs | {"x": inputs["x"] * 2})
        total: Tensor = y.sum() + state.float().sum()
        return total


@pytest.mark.parametrize("op", MODULES)
def test_compiled_is_eager_for_any_length(op: str, device: torch.device, make: Make, ran: list[str]) -> None:
    call = Call(op_on(op, device))
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)
    for seq in (7, 1, 12):
        inputs = moved(make(op, seq=seq), device)
        torch.testing.assert_close(compiled(inputs), call(inputs), rtol=1e-4, atol=1e-3)
    assert set(ran) == {"kernels"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("op", MODULES)
@pytest.mark.parametrize("seq", [1, 9])
def test_a_captured_call_replays_on_new_inputs(
    op: str, seq: int, dtype: torch.dtype, cuda: torch.device, make: Make, ran: list[str]
) -> None:
    """From non-contiguous inputs, so that the copies are captured too."""
    first, second = (make(op, seq=seq, dtype=dtype, seed=seed) for seed in (0, 1))
    held = moved(first | permuted("x", "state")(first), cuda)
    call = op_on(op, cuda)
    call(**held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(**held)
    assert ran == ["kernels", "kernels"]
    for inputs in (second, first):
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                held[name].copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        within(captured, exact(op, inputs), op, dtype=dtype)


@pytest.mark.gpu
def test_attention_can_be_captured(cuda: torch.device, attention_inputs: Make) -> None:
    first, second = (attention_inputs(seed=seed, pads=(2,)) for seed in (0, 1))
    held = moved(first, cuda)
    h1.attention(**held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = h1.attention(**held)
    for inputs in (second, first):
        for name, value in moved(inputs, cuda).items():
            if isinstance(value, Tensor):
                held[name].copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        for got, true in zip(captured, h1.attention(**inputs), strict=True):
            torch.testing.assert_close(got.cpu(), true, rtol=1e-4, atol=1e-4)


def test_attention_on_cuda_computes_what_it_computes_on_a_cpu(
    attention_inputs: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function for CUDA with memory that is not pinned, which a CPU cannot do without a GPU."""
    monkeypatch.setattr(attention_op, "_pinned_frequencies", attention_op.rope_frequencies)
    inputs = attention_inputs(pads=(2,), first_position=90_000)
    assert all(map(torch.equal, attention_op.on_cuda(**inputs), h1.attention(**inputs)))


@pytest.mark.gpu
@pytest.mark.parametrize("op", MODULES)
def test_the_op_waits_for_nothing(op: str, cuda: torch.device, make: Make) -> None:
    """PyTorch itself reports a call that makes the host wait for the device."""
    inputs = make(op)
    held = moved(inputs | permuted("x", "state")(inputs) | ({"dt_max": math.inf} if op == "ssm_scan" else {}), cuda)
    call = op_on(op, cuda)
    call(**held)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(**held)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_importing_the_ops_does_not_import_triton() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import h1export.plugins; "
        "print([m for m in set(sys.modules) - before if m.split('.')[0] == 'triton'])"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
    for op in MODULES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"h1::{op}", "CUDA")
