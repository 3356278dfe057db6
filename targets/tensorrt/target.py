"""The target "trt": an ONNX network with the plugin of the h1 ops."""

from __future__ import annotations

from h1export.core.artifact import Artifact
from h1export.core.progress import Progress
from h1export.core.quant import Integers
from h1export.core.stage import Stage
from h1export.core.weights import WeightStore
from h1export.errors import H1ExportError
from h1export.graphs.programs import Program
from h1export.targets.base import BuildOptions, Kernels, Lowered
from h1export.targets.tensorrt import network
from h1export.targets.tensorrt.runner import TensorRTRunner


class TensorRTTarget:
    name = "trt"
    packages = ("numpy", "onnx-ir", "torch")

    def lower(
        self, program: Program, store: WeightStore, integers: Integers, options: BuildOptions, stage: Stage, progress: Progress
    ) -> Lowered:
        network.check(integers, options)
        progress.stage("weights", store.nbytes)
        return network.write(program, store, integers, options, stage)

    def load(self, artifact: Artifact, threads: int = 0, float32: bool = False, kernels: Kernels = "auto") -> TensorRTRunner:
        if kernels == "native":
            raise H1ExportError(
                artifact.folder, "its kernels run on GPUs only, and this executes the network on a CPU", "leave out --kernels native"
            )
        return TensorRTRunner(artifact, threads, float32)


target = TensorRTTarget()
