"""LoadedEngine: an engine in a GPU's memory, read after its requirements were checked, and called on tensors there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.targets.tensorrt import sdk
from h1export.targets.tensorrt.engine.config import ENGINE, LIBRARY, EngineConfig
from h1export.targets.tensorrt.engine.requirements import EngineRequirements, Host, check
from h1export.targets.tensorrt.gpu.device import Gpu
from h1export.targets.tensorrt.network.layout import DECODE, PREFILL
from h1export.targets.tensorrt.network.limits import Limits
from h1export.targets.tensorrt.options import TensorRTOptions


class TrtLogger:
    """The errors that TensorRT logs about the engine file ``path``.

    Attributes:
        name: the runtime with its version, and the GPU's architecture.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self.name = name
        self._errors = list[str]()

    def add(self, text: str) -> None:
        """Record an error of TensorRT."""
        self._errors.append(text)

    def error(self, what: str) -> H1ExportError:
        """Return the error that TensorRT ``what``, with its latest message as the reason; all messages are deleted."""
        reason = self._errors[-1] if self._errors else "it gives no reason"
        self._errors.clear()
        return H1ExportError(
            self._path,
            f"{self.name} {what}: {reason}",
            "run h1export trt build-engine on the artifact, or build it again",
        )


class LoadedEngine:
    """model.engine of ``artifact`` on ``gpu``.

    All calls run in one stream, one after the other, so they share one working memory.

    Attributes:
        artifact: the artifact of the engine.
        gpu: the GPU that runs it.
        limits: the largest batch and context of a call.
        gpu_name: the GPU's architecture, such as sm_89.
        all_logits: whether a call returns logits for each of its tokens, or for the last one only.

    Raises:
        H1ExportError: the runtime or the engine is missing, the engine is not for this machine, or TensorRT cannot load
            it.
    """

    def __init__(self, artifact: Artifact, gpu: Gpu) -> None:
        config = EngineConfig.read(artifact.folder)
        requirements = EngineRequirements.of(artifact)
        host = Host.here(config)
        check(artifact.folder, requirements, host)  # before the engine is read, because it holds executable code
        self.artifact = artifact
        self.gpu = gpu
        self.limits = Limits.of(artifact)
        self.all_logits = not TensorRTOptions.read(artifact).last_logits
        self.gpu_name = f"sm_{host.architecture}"
        self._profiles = {profile.name: index for index, profile in enumerate(config.profiles)}
        path = artifact.folder / ENGINE
        self._log = TrtLogger(path, f"{sdk.NAMES[config.runtime]} {requirements.version} on {self.gpu_name}")
        self._trt = sdk.module(config.runtime, config.versions)
        try:
            # The runtime must outlive the objects that it makes.
            self._runtime = self._trt.Runtime(sdk.logger(self._trt, self._log.add))
        except TypeError:  # TensorRT's binding raises it where the runtime cannot be created
            raise self._log.error("does not start") from None
        if self._runtime.get_plugin_registry().load_library(str(artifact.folder / LIBRARY)) is None:
            raise self._log.error("cannot load the plugin")
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise self._log.error("cannot load it")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._inputs = {name for name in names if self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT}
        self._memory = torch.empty(max(1, self._engine.device_memory_size_v2), dtype=torch.uint8, device=gpu.device)
        self._compiled: Any = None  # the kernels that TensorRT-RTX compiles, shared by all contexts
        self._shared = {profile: self.context(profile) for profile in (DECODE, PREFILL)}

    @property
    def name(self) -> str:
        """The runtime with its version, and the GPU's architecture."""
        return self._log.name

    def shared(self, tokens: int) -> Context:
        """Return the common context for calls of ``tokens`` tokens; a caller binds its own tensors before each call."""
        return self._shared[DECODE if tokens == 1 else PREFILL]

    def context(self, profile: str) -> Context:
        """Make a new context for calls in the optimization profile ``profile``.

        Raises:
            H1ExportError: TensorRT refuses.
        """
        made = self._engine.create_execution_context(self._config(profile))
        if made is None:
            raise self._log.error("makes no context")
        made.set_device_memory(self._memory.data_ptr(), self._memory.numel())
        if not made.set_optimization_profile_async(self._profiles[profile], self.gpu.handle):
            raise self._log.error(f"does not take the profile {profile}")
        return Context(made, self._inputs, self.gpu.handle, log=self._log)

    def _config(self, profile: str) -> Any:
        """Return the runtime configuration of a context.

        The context uses our working memory, because TensorRT-RTX cannot be recorded as a CUDA graph with its own.
        TensorRT-RTX compiles kernels at run time: for single tokens before the call (eager), so that a recorded graph
        holds them, and for prompts, which have many sizes, beside the first calls (lazy).
        """
        trt = self._trt
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            self._compiled = self._compiled or config.create_runtime_cache()
            config.set_runtime_cache(self._compiled)
            strategies = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = (
                strategies.EAGER if profile == DECODE else strategies.LAZY
            )
        return config


class Context:
    """An execution context of a LoadedEngine: it runs the engine on the tensors that it is bound to, in one stream."""

    def __init__(self, context: Any, inputs: set[str], stream: int, *, log: TrtLogger) -> None:
        self._context = context
        self._inputs = inputs
        self._stream = stream
        self._log = log

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let calls read and write ``tensors``, the inputs and outputs by name. The caller keeps the tensors alive.

        Raises:
            H1ExportError: the engine does not have a name, or does not take a shape.
        """
        for name, tensor in tensors.items():
            done = self._context.set_tensor_address(name, tensor.data_ptr())
            if done and name in self._inputs:
                done = self._context.set_input_shape(name, tuple(tensor.shape))
            if not done:
                raise self._log.error(f"does not take {name} {list(tensor.shape)}")

    def launch(self) -> None:
        """Enqueue one call in the stream.

        Raises:
            H1ExportError: TensorRT refuses the call.
        """
        if not self._context.execute_async_v3(self._stream):
            raise self._log.error("cannot run")

    def recordable(self) -> bool:
        """Return whether a call can be recorded as a CUDA graph; only TensorRT-RTX has a function that may say no."""
        is_capturable = getattr(self._context, "is_stream_capturable", None)
        return is_capturable is None or bool(is_capturable(self._stream))
