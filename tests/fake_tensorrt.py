"""A fake of TensorRT and a GPU: an engine whose calls read and write memory at the addresses that they were bound to.

The engine computes model.onnx on the CPU. Like the real one it refuses shapes outside a profile, requires a state's
output in the memory of its input, and runs nothing while a graph is recorded.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, IntEnum
from math import prod
from pathlib import Path
from threading import RLock
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from h1export.artifact.artifact import Artifact
from h1export.targets.tensorrt.emulator.execution import Execution
from h1export.targets.tensorrt.engine.requirements import Host

HOST = Host({"tensorrt": "10.15.1"}, 89)  # the machine that the fakes simulate
STREAM = 7
DTYPES = {"INT64": torch.int64, "FLOAT": torch.float32, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16}


class Mode(Enum):
    INPUT = 0
    OUTPUT = 1


class Allocation(IntEnum):
    STATIC = 0
    USER_MANAGED = 2


MEMORY = 4096  # bytes of working memory that a context needs


def memory(address: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the tensor that is stored at ``address``."""
    raw = (ctypes.c_byte * (prod(shape) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).view(shape)


class FakeGpu:
    """A fake of Gpu in targets/tensorrt/gpu/device.py that uses the CPU's memory.

    Attributes:
        recorded: number of graphs that were recorded.
    """

    device = torch.device("cpu")
    handle = STREAM
    recorded = 0
    _open: list[Callable[[], None]] | None = None

    def __init__(self) -> None:
        self._turn = RLock()

    @contextmanager
    def current(self) -> Iterator[None]:
        with self._turn:
            yield

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        FakeGpu.recorded += 1
        FakeGpu._open = kept = []
        launch()
        FakeGpu._open = None
        return lambda: [run() for run in kept] and None

    @classmethod
    def enqueue(cls, run: Callable[[], None]) -> None:
        if cls._open is None:
            run()
        else:
            cls._open.append(run)


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._profile = -1
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.asked = 0
        self.memory = 0

    def set_device_memory(self, address: int, size: int) -> None:
        assert address
        self.memory = size

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._profile = index
        return stream == STREAM

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self._engine.ports

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine.profiles[self._profile]["inputs"][name]
        self._shapes[name] = shape
        return len(shape) == len(most) and all(
            low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        )

    def is_stream_capturable(self, stream: int) -> bool:
        self.asked += 1
        return self.asked > 1  # the first answer simulates kernels that are still being compiled

    def execute_async_v3(self, stream: int) -> bool:
        addresses = dict(self._addresses)
        shapes = dict(self._shapes)
        aliased = all(
            addresses[name] == addresses[name.replace("present", "past_key_values")]
            for name in addresses
            if "present" in name
        )
        if (
            stream != STREAM
            or self.memory < MEMORY
            or addresses.keys() != self._engine.ports.keys()
            or not aliased
            or self._engine.broken
        ):
            self._engine.log("what it is bound to is wrong")
            return False
        FakeGpu.enqueue(lambda: self._engine.call(addresses, shapes))
        return True


class FakeConfig:
    allocation = Allocation.STATIC
    cache: Any = None
    dynamic_shapes_kernel_specialization_strategy = "none"

    def set_execution_context_allocation_strategy(self, strategy: Allocation) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> object:
        return object()

    def set_runtime_cache(self, cache: object) -> None:
        self.cache = cache


class FakeEngine:
    def __init__(self, folder: Path, log: Callable[[str], None]) -> None:
        artifact = Artifact.open(folder)
        self._execution = Execution(folder, artifact.manifest.files, rounded=True)
        self._inputs = artifact.manifest.inputs
        outputs = artifact.manifest.outputs
        self.ports = {**self._inputs, **outputs}
        self.profiles = json.loads((folder / "recipe.json").read_text())["profiles"]
        self.log = log
        self.broken = False
        self.contexts: list[FakeContext] = []
        self.configs: list[FakeConfig] = []
        self.num_io_tensors = len(self.ports)
        self.device_memory_size_v2 = MEMORY

    def create_runtime_config(self) -> FakeConfig:
        return FakeConfig()

    def create_execution_context(self, config: FakeConfig) -> FakeContext:
        assert config.allocation is Allocation.USER_MANAGED
        self.configs.append(config)
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]

    def get_tensor_name(self, index: int) -> str:
        return list(self.ports)[index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name in self._inputs else Mode.OUTPUT

    def call(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        given = {
            name: memory(addresses[name], DTYPES[dtype], shapes[name]) for name, (dtype, _) in self._inputs.items()
        }
        found = self._execution.run(
            {name: (t.float() if t.is_floating_point() else t).numpy().copy() for name, t in given.items()}
        )
        for name, value in found.items():
            there = memory(addresses[name], DTYPES[self.ports[name][0]], value.shape)
            there.copy_(torch.from_numpy(np.ascontiguousarray(value)))


class FakeTensorRT:
    """A fake of the module tensorrt.

    Attributes:
        engines: the engines that were read.
    """

    TensorIOMode = Mode
    ExecutionContextAllocationStrategy = Allocation
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager", LAZY="lazy")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engines = list[FakeEngine]()
        self.loads_plugin = self.reads = True
        self.ILogger = type("ILogger", (), {"ERROR": 1, "__init__": lambda self: None})

    def Runtime(self, logger: Any) -> Any:  # noqa: N802  TensorRT's name
        def log(text: str) -> None:
            logger.log(1, text)

        def read(data: bytes) -> FakeEngine | None:
            assert data == b"engine"
            if not self.reads:
                log("it is of another version")
                return None
            self.engines.append(FakeEngine(self.folder, log))
            return self.engines[-1]

        registry = SimpleNamespace(
            load_library=lambda path: path if self.loads_plugin and Path(path).is_file() else None
        )
        return SimpleNamespace(get_plugin_registry=lambda: registry, deserialize_cuda_engine=read)
