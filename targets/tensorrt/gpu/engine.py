"""An engine in a GPU's memory: read after its passport was checked, and called with the addresses of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.targets.tensorrt import sdk
from h1export.targets.tensorrt.engine.config import EngineConfig
from h1export.targets.tensorrt.engine.requirements import EngineRequirements, Host, check
from h1export.targets.tensorrt.gpu.device import Gpu
from h1export.targets.tensorrt.network.layout import DECODE, PREFILL
from h1export.targets.tensorrt.network.limits import Limits
from h1export.targets.tensorrt.options import TensorRTOptions


class TrtLogger:
    """What TensorRT says of the engine in ``path``; ``name``: its version, and the GPU."""

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self.name = name
        self._said = list[str]()

    def hear(self, text: str) -> None:
        self._said.append(text)

    def error(self, what: str) -> H1ExportError:
        """``what`` went wrong, with the last words, which are then forgotten."""
        said = self._said[-1] if self._said else "it does not say why"
        self._said.clear()
        return H1ExportError(
            self._path,
            f"{self.name} {what}: {said}",
            "run h1export trt build-engine on the artifact, or build it again",
        )


class LoadedEngine:
    """model.engine of ``artifact`` on ``gpu``.

    All calls go to one stream, one after the other, and so have one working memory.

    Attributes:
        name: the runtime with its version, and the GPU's architecture.
        gpu_name: the architecture alone.
        all_logits: whether a call gives logits for each of its tokens, or for the last.

    Raises:
        H1ExportError: no runtime or engine, an engine that is not for this machine, or one that TensorRT does not load.
    """

    def __init__(self, artifact: Artifact, gpu: Gpu) -> None:
        recipe = EngineConfig.read(artifact.folder)
        requirements = EngineRequirements.of(artifact)
        host = Host.here(recipe)
        check(artifact.folder, requirements, host)  # before anything is read
        self.artifact = artifact
        self.gpu = gpu
        self.limits = Limits.of(artifact)
        self.all_logits = not TensorRTOptions.read(artifact).last_logits
        self.gpu_name = f"sm_{host.architecture}"
        self._profiles = {profile.name: index for index, profile in enumerate(recipe.profiles)}
        path = artifact.folder / recipe.engine
        self._voice = TrtLogger(path, f"{sdk.NAMES[recipe.runtime]} {requirements.version} on {self.gpu_name}")
        self._trt = sdk.module(recipe.runtime, recipe.versions)
        try:
            self._runtime = self._trt.Runtime(sdk.logger(self._trt, self._voice.hear))  # outlives what it makes
        except TypeError:  # a factory that returned nothing
            raise self._voice.error("does not start") from None
        if self._runtime.get_plugin_registry().load_library(str(artifact.folder / recipe.plugin)) is None:
            raise self._voice.error("cannot load the plugin")
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise self._voice.error("cannot load it")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._inputs = {name for name in names if self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT}
        self._memory = torch.empty(max(1, self._engine.device_memory_size_v2), dtype=torch.uint8, device=gpu.device)
        self._compiled: Any = None  # TensorRT-RTX's kernels, for all contexts
        self._shared = {profile: self.context(profile) for profile in (DECODE, PREFILL)}

    @property
    def name(self) -> str:
        return self._voice.name

    def shared(self, tokens: int) -> Context:
        """The context that every call of so many tokens may use, bound anew."""
        return self._shared[DECODE if tokens == 1 else PREFILL]

    def context(self, profile: str) -> Context:
        """A context of its own."""
        made = self._engine.create_execution_context(self._config(profile))
        if made is None:
            raise self._voice.error("makes no context")
        made.set_device_memory(self._memory.data_ptr(), self._memory.numel())
        if not made.set_optimization_profile_async(self._profiles[profile], self.gpu.handle):
            raise self._voice.error(f"does not take the profile {profile}")
        return Context(made, self._inputs, self.gpu.handle, self._voice)

    def _config(self, profile: str) -> Any:
        """Working memory is ours: with its own, TensorRT-RTX does not let itself be recorded.

        It compiles kernels while the model runs: those of single tokens before the call, so that a graph holds them; those of prompts,
        whose sizes are many, beside the first calls.
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
    """One way of calling a LoadedEngine, on the tensors that it is bound to; ``stream``: the GPU's."""

    def __init__(self, context: Any, inputs: set[str], stream: int, voice: TrtLogger) -> None:
        self._context = context
        self._inputs = inputs
        self._stream = stream
        self._voice = voice

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let calls read and write ``tensors``, inputs and outputs by name, which the caller keeps.

        Raises:
            H1ExportError: a name or a shape that the engine does not have.
        """
        for name, tensor in tensors.items():
            done = self._context.set_tensor_address(name, tensor.data_ptr())
            if done and name in self._inputs:
                done = self._context.set_input_shape(name, tuple(tensor.shape))
            if not done:
                raise self._voice.error(f"does not take {name} {list(tensor.shape)}")

    def launch(self) -> None:
        """Put one call into the stream. Raises H1ExportError where TensorRT refuses it."""
        if not self._context.execute_async_v3(self._stream):
            raise self._voice.error("cannot run")

    def recordable(self) -> bool:
        """Whether a graph may be made of a call. TensorRT-RTX can say no; TensorRT has no such question."""
        asked = getattr(self._context, "is_stream_capturable", None)
        return asked is None or bool(asked(self._stream))
