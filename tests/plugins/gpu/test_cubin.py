"""Kernels compiled without a GPU, and the roofline estimates against what the kernels do.

Compiling needs a process of its own, because Triton interprets kernels in this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from roofline import GPUS, PUBLISHED, Work, conv_work, resident_warps, scan_work

from h1export.errors import H1ExportError
from h1export.plugins.causal_conv import launch as conv
from h1export.plugins.gpu.cubin import ARCHITECTURES, SHARED_LIMIT, Cubin, check_limits, compile_kernel
from h1export.plugins.gpu.kernel import run
from h1export.plugins.ssm_scan.launch import Problem, kernels, launches
from h1export.plugins.ssm_scan.tiles import TILES

pytestmark = pytest.mark.trt

SCRIPT = """
import json, sys
from dataclasses import replace
from h1export.errors import H1ExportError
from h1export.plugins.causal_conv import launch as conv
from h1export.plugins.gpu.cubin import check_limits, compile_kernel
from h1export.plugins.ssm_scan.launch import kernels

choices = [*kernels(128, 256, "bf16"), *kernels(64, 128, "fp16"), conv.kernel("fp16", 4, True, one_token=False)]
for index, changed, architecture in json.loads(sys.argv[1]):
    kernel = choices[index]
    kernel = replace(kernel, constants=tuple((dict(kernel.constants) | changed).items()))
    cubin = compile_kernel(kernel, architecture)
    message = ""
    try:
        check_limits(cubin)
    except H1ExportError as error:
        message = str(error)
    resources = [cubin.registers, cubin.spilled, cubin.shared]
    print(json.dumps({"code": cubin.code.hex(), "entry": cubin.entry, "resources": resources, "message": message}))
"""


@pytest.fixture(scope="module")
def compiled() -> Callable[..., list[dict[str, Any]]]:
    """compiled((index into the script's choices, changed constants, architecture), ...) -> the script's results."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def compile_all(*pairs: tuple[int, dict[str, int], int]) -> list[dict[str, Any]]:
        command = [sys.executable, "-c", SCRIPT, json.dumps(pairs)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return [json.loads(line) for line in done.stdout.splitlines()]

    return compile_all


def test_kernels_compile_within_their_limits(compiled: Callable[..., list[dict[str, Any]]]) -> None:
    """Compile the kernel with the most registers, decode and the convolution, and decode again to the same bytes."""
    scan, decode, convolution, again = compiled((2, {}, 120), (7, {}, 80), (8, {}, 90), (7, {}, 80))
    for cubin, name in ((scan, "chunk_scan"), (decode, "decode"), (convolution, "causal_conv")):
        code = bytes.fromhex(cubin["code"])
        assert code.startswith(b"\x7fELF")
        assert cubin["entry"].encode() in code
        assert cubin["entry"] == name
        assert str(Path(__file__).parents[3]).encode() not in code
        assert cubin["message"] == ""
        assert 0 < cubin["resources"][0] <= 255
    assert decode["resources"][1] == convolution["resources"][1] == 0
    assert decode == again


def test_tiles_that_are_too_large_are_seen(compiled: Callable[..., list[dict[str, Any]]]) -> None:
    (fault,) = compiled((0, {"BP": 128, "BN": 256}, 80))
    assert "chunk_state_bf16_P128_N256_Q256_BT32_BP128_BN256 for sm_80: spills" in fault["message"]
    assert fault["resources"][1] > 64


@pytest.mark.parametrize(
    ("spilled", "shared", "name", "text"), [(4, 0, "decode", "spills 4"), (0, 99 * 1024 + 1, "chunk_scan", "shared")]
)
def test_a_limit_that_is_passed_is_seen(spilled: int, shared: int, name: str, text: str) -> None:
    (kernel,) = [kernel for kernel in kernels(64, 128, "fp16") if kernel.name == name]
    good = Cubin(kernel, 86, b"", entry=name, registers=64, spilled=0, shared=0)
    check_limits(good)
    assert resident_warps(good) == 32
    with pytest.raises(H1ExportError, match=text):
        check_limits(replace(good, spilled=spilled, shared=shared))


def test_the_interpreter_compiles_nothing() -> None:
    with pytest.raises(H1ExportError, match="unset TRITON_INTERPRET"):
        compile_kernel(kernels(64, 128, "fp16")[0], 80)


def test_every_published_shape_has_tiles() -> None:
    assert {(shape.d_head, shape.d_state) for shape in PUBLISHED} <= TILES.keys()
    assert all(shape.channels % 16 == 0 for shape in PUBLISHED)
    assert SHARED_LIMIT.keys() == set(ARCHITECTURES)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Work]:
    """counted(launch, tensors) -> the distinct bytes that a launch moves, and the operations of its products."""
    from triton.runtime.interpreter import InterpreterBuilder

    touched: dict[str, set[int]] = {"load": set(), "store": set()}
    operations = [0]
    dot, load, store = (
        getattr(InterpreterBuilder, f"create_{name}") for name in ("dot", "masked_load", "masked_store")
    )

    def spy_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        touch("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def spy_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        touch("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def touch(how: str, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for address in pointers.data[mask.data].ravel():
            touched[how].update(range(int(address), int(address) + size))

    def spy_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        operations[0] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, *rest)

    for name, spy in (("dot", spy_dot), ("masked_load", spy_load), ("masked_store", spy_store)):
        monkeypatch.setattr(InterpreterBuilder, f"create_{name}", spy)

    def count(launch: Any, tensors: dict[str, torch.Tensor]) -> Work:
        touched["load"].clear()
        touched["store"].clear()
        operations[0] = 0
        run([launch], tensors)
        return Work(len(touched["load"]) + len(touched["store"]), operations[0])

    return count


WEIGHTS = 4 * 4 * 2  # bytes of A, D, dt_bias and total of two heads, which the estimate leaves out


@pytest.mark.parametrize("tokens", [1, 128])
def test_the_estimate_is_what_the_scan_does(
    tokens: int, scan_inputs: Callable[..., Any], counted: Callable[..., Work]
) -> None:
    inputs = scan_inputs(1, tokens, 2, 1, 32, 64, dtype=torch.float16)
    problem = Problem(1, tokens, 2, groups=2, d_head=32, d_state=64, dtype="fp16", dt_min=0.0, dt_max=1.0)
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in problem.workspace().items()}
    tensors |= {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    tensors |= {
        "mask": inputs["mask"].half(),
        "y": torch.empty_like(inputs["x"]),
        "new_state": torch.empty_like(inputs["state"]),
    }
    estimates = scan_work(problem)
    for launch in launches(problem):
        work = counted(launch, tensors)
        estimate = estimates[launch.kernel.name]
        assert work.operations == estimate.operations
        assert 0 <= work.bytes - estimate.bytes <= WEIGHTS
    assert len(estimates) == len(launches(problem))


@pytest.mark.parametrize("tokens", [1, 19])
def test_the_estimate_is_what_the_convolution_does(
    tokens: int, conv_inputs: Callable[..., Any], counted: Callable[..., Work]
) -> None:
    inputs = conv_inputs(1, tokens, 48, dtype=torch.float16)
    tensors = inputs | {"y": torch.empty_like(inputs["x"]), "new_state": torch.empty_like(inputs["state"])}
    launch = conv.launch(conv.kernel("fp16", 4, True, one_token=tokens == 1), 1, tokens, channels=48)
    assert counted(launch, tensors) == conv_work(1, tokens, 48, taps=4)


def test_seconds_are_those_of_the_tighter_bound() -> None:
    gpu = GPUS[0]._replace(bandwidth=10.0, tensor=100.0)
    assert (Work(20, 100).seconds(gpu), Work(20, 100).bound(gpu)) == (2.0, "memory")
    assert (Work(20, 500).seconds(gpu), Work(20, 500).bound(gpu)) == (5.0, "compute")
    work = scan_work(Problem(1, 1, 24, groups=1, d_head=64, d_state=128, dtype="fp16", dt_min=0, dt_max=1))
    assert np.isclose(work["decode"].bytes, 2 * 4 * 24 * 64 * 128, rtol=0.02)
