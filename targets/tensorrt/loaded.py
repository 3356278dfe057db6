"""An engine in a GPU's memory: read after its passport was checked, and called with the addresses of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from h1export.core.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.targets.tensorrt import sdk
from h1export.targets.tensorrt.gpu import Gpu
from h1export.targets.tensorrt.limits import Limits
from h1export.targets.tensorrt.passport import Host, Passport, check
from h1export.targets.tensorrt.recipe import Recipe


class LoadedEngine:
    """model.engine of ``artifact`` on ``gpu``.

    Attributes:
        name: the runtime with its version, and the GPU's architecture.
        all_logits: whether a call gives logits for each of its tokens, or for the last.

    Raises:
        H1ExportError: no runtime or engine, an engine that is not for this machine, or one that TensorRT does not load.
    """

    def __init__(self, artifact: Artifact, gpu: Gpu) -> None:
        recipe, passport = Recipe.read(artifact.folder), Passport.of(artifact)
        host = Host.here(recipe)
        check(artifact.folder, passport, host)  # before anything is read
        self.artifact, self.gpu, self.limits = artifact, gpu, Limits.of(artifact)
        self.all_logits = not artifact.manifest.options["last_logits"]
        self.name = f"{sdk.NAMES[recipe.runtime]} {passport.version} on sm_{host.architecture}"
        self._path, self._said = artifact.folder / recipe.engine, list[str]()
        self._profiles = {profile.name: index for index, profile in enumerate(recipe.profiles)}
        self._trt = sdk.module(recipe.runtime, recipe.versions)
        self._runtime = self._trt.Runtime(sdk.logger(self._trt, self._said.append))  # outlives what it makes
        if self._runtime.get_plugin_registry().load_library(str(artifact.folder / recipe.plugin)) is None:
            raise self.error("cannot load the plugin")
        self._engine = self._runtime.deserialize_cuda_engine(self._path.read_bytes())
        if self._engine is None:
            raise self.error("cannot load it")
        self._shared = {profile: self.context(profile) for profile in self._profiles}

    def shared(self, tokens: int) -> Context:
        """The context that every call of so many tokens may use, bound anew."""
        return self._shared["decode" if tokens == 1 else "prefill"]

    def context(self, profile: str) -> Context:
        """A context of its own, with the working memory of ``profile``."""
        made = self._engine.create_execution_context(self._config())
        if made is None or not made.set_optimization_profile_async(self._profiles[profile], self.gpu.handle):
            raise self.error(f"has no memory for the profile {profile}")
        return Context(self, made)

    def _config(self) -> Any:
        """Working memory of one profile alone. TensorRT-RTX: a call's kernels before the call, and not beside the first calls."""
        trt, config = self._trt, self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE)
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return config

    def is_input(self, name: str) -> bool:
        """Of a tensor that calls are bound to."""
        return bool(self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT)

    def error(self, what: str) -> H1ExportError:
        """``what`` went wrong, with what TensorRT last said."""
        said = self._said[-1] if self._said else "it does not say why"
        return H1ExportError(self._path, f"{self.name} {what}: {said}", "run h1export finish on the artifact, or build it again")


class Context:
    """One way of calling a LoadedEngine, on the tensors that it is bound to."""

    def __init__(self, engine: LoadedEngine, context: Any) -> None:
        self._engine, self._context = engine, context

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let calls read and write ``tensors``, inputs and outputs by name, which the caller keeps.

        Raises:
            H1ExportError: a name or a shape that the engine does not have.
        """
        for name, tensor in tensors.items():
            done = self._context.set_tensor_address(name, tensor.data_ptr())
            if done and self._engine.is_input(name):
                done = self._context.set_input_shape(name, tuple(tensor.shape))
            if not done:
                raise self._engine.error(f"does not take {name} {list(tensor.shape)}")

    def launch(self) -> None:
        """Put one call into the GPU's stream. Raises H1ExportError where TensorRT refuses it."""
        if not self._context.execute_async_v3(self._engine.gpu.handle):
            raise self._engine.error("cannot run")

    def recordable(self) -> bool:
        """Whether a graph may be made of a call. TensorRT-RTX can say no; TensorRT has no such question."""
        asked = getattr(self._context, "is_stream_capturable", None)
        return asked is None or bool(asked(self._engine.gpu.handle))
