"""One node of ours at a time, on the library as compiled for this machine, as for others, and in plain C++.

Where tests/kernel_hosts.py has a command, on that command alone.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from typing import Any

import kernel_hosts
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from h1export.targets.onnxruntime.kernel_build import LEVELS, cpu_features
from h1export.targets.onnxruntime.native_library import CPUINFO
from h1export.targets.onnxruntime.native_library import compiled as library

DOMAIN = "h1export"
STATES = {
    "CausalConv": ("state",),
    "SSMScan": ("state",),
    "Attention": ("past_k", "past_v"),
}  # op -> inputs that outputs replace
VARIANTS: dict[str, tuple[str, ...]] = {"native": (), "portable": ("-DH1_PORTABLE",)}
FEATURES = cpu_features(CPUINFO.read_text("ascii", errors="replace"))
if not {"avx512_vnni", "avx_vnni"} & FEATURES:
    VARIANTS["vnni"] = ("-DH1_DOT4",)  # elsewhere "native" is the same code
if platform.machine() in ("x86_64", "AMD64"):
    # without the instructions that newer CPUs have
    lower = ("avx512-vnni", "avx2") if "amx_int8" in FEATURES else ("avx2",)
    VARIANTS |= {level.name: level.flags for level in LEVELS["x86_64"] if level.name in lower}
FLOAT32 = np.dtype(np.float32)
GUARD, BEHIND = 16384, 0xA5  # bytes behind an output, and what they are
HOST = kernel_hosts.command()
if HOST:
    VARIANTS = {"host": ()}
Arrays = Mapping[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="session", params=list(VARIANTS))
def native_library(request: pytest.FixtureRequest) -> str:
    """The compiled library; warnings fail, but those of "native", which is the library that the other tests use too.

    A worker of xdist compiles all variants at once, and every second worker begins with the last: two that need the
    same one would wait for one compiler.
    """
    if HOST:
        return ""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker:
        for variant in list(VARIANTS)[:: -1 if int(worker.removeprefix("gw")) % 2 else 1]:
            compiled(variant)
    return compiled(request.param)


def compiled(variant: str) -> str:
    """Return the path of a variant's library."""
    flags = VARIANTS[variant]
    return str(library(("-Wall", "-Wextra", "-Werror", *flags) if flags else ()))


@pytest.fixture(scope="session")
def run_on() -> Callable[[str], Callable[..., list[Any]]]:
    """run_on(library) -> run_op, which looks at the memory behind outputs too, but not on a command."""

    def on(path: str) -> Callable[..., list[Any]]:
        def run(
            op: str,
            inputs: Mapping[str, Any],
            outputs: int = 1,
            threads: int = 2,
            constants: Arrays | None = None,
            **attributes: Any,
        ) -> Any:
            if HOST:
                return kernel_hosts.compute(HOST, op, inputs, outputs, threads, attributes)
            made, fed = session(path, op, inputs, outputs, threads, constants or {}, attributes)
            results = made.run(None, fed)
            look_behind(made, fed, results)
            return results

        return run

    return on


@pytest.fixture(scope="session")
def run_op(native_library: str, run_on: Callable[[str], Callable[..., list[Any]]]) -> Callable[..., list[Any]]:
    """run_op("SiluMul", {"a": array, "gate": None}, outputs=1, threads=2, **attributes) -> outputs.

    None: an absent input. A module that needs another library overrides this fixture, and not ``native_library``:
    pytest would keep this one with the library that the other module gave it.
    """
    return run_on(native_library)


@pytest.fixture(scope="session")
def run_in_place(native_library: str) -> Callable[..., list[Any]]:
    """As run_op, with the states' memory bound to the inputs and to the outputs that replace them."""

    def run(op: str, inputs: Mapping[str, Any], outputs: int, threads: int = 2, **attributes: Any) -> Any:
        if HOST:
            places = {i: list(inputs).index(name) for i, name in enumerate(STATES[op], 1)}
            return kernel_hosts.compute(HOST, op, inputs, outputs, threads, attributes, places)
        made, fed = session(native_library, op, inputs, outputs, threads, {}, attributes)
        binding = made.io_binding()
        states = STATES[op]
        values = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in fed.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("out0")
        for i, name in enumerate(states, 1):
            binding.bind_ortvalue_output(f"out{i}", values[name])
        made.run_with_iobinding(binding)
        return [binding.get_outputs()[0].numpy(), *(values[name].numpy() for name in states)]

    return run


def look_behind(made: Any, fed: Mapping[str, Any], results: list[Any]) -> None:
    """Compute again into memory of these sizes: the bytes behind it must stay, and the results be the same."""
    binding = made.io_binding()
    for name, value in fed.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
    memory = [np.full(result.nbytes + GUARD, BEHIND, np.uint8) for result in results]
    for port, result, at in zip(made.get_outputs(), results, memory, strict=True):
        binding.bind_output(port.name, "cpu", 0, result.dtype, result.shape, at.ctypes.data)
    made.run_with_iobinding(binding)
    for result, at in zip(results, memory, strict=True):
        assert (at[result.nbytes :] == BEHIND).all(), "written behind an output"
        assert at[: result.nbytes].tobytes() == result.tobytes()


def session(
    path: str, op: str, inputs: Mapping[str, Any], outputs: int, threads: int, constants: Arrays, attributes: Any
) -> Any:
    """A session of the one node, and what to feed it. ``constants`` become initializers, the other inputs are fed."""
    fed = {name: value for name, value in inputs.items() if value is not None and name not in constants}
    names = [name if value is not None else "" for name, value in inputs.items()]
    results = [f"out{i}" for i in range(outputs)]
    # an output that replaces a state has its dtype, and the others are float32
    kinds = {f"out{i}": fed[state].dtype for i, state in enumerate(STATES.get(op, ()), 1) if state in fed}
    graph = helper.make_graph(
        [helper.make_node(op, names, results, domain=DOMAIN, **attributes)],
        "one_node",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in fed.items()
        ],
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(kinds.get(name, FLOAT32)), None)
            for name in results
        ],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)], ir_version=10
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors also come as exceptions
    options.register_custom_ops_library(path)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]), fed
