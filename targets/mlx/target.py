"""The target "mlx": a folder that mlx-lm runs as it is, with µP folded into the weights."""

from __future__ import annotations

from collections.abc import Iterator

from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import StoredPart, StoredWeight
from h1export.artifact.stage import Stage
from h1export.checkpoint.store import WeightStore
from h1export.graphs.program import Program
from h1export.model.falcon_h1.tensors import tensor_shapes
from h1export.progress import Progress
from h1export.quantize.source import QuantizedWeights
from h1export.targets.base import Finding, Lowered
from h1export.targets.hf_folder.ports import INPUTS, outputs
from h1export.targets.hf_folder.shards import dtype_counts, write_shards
from h1export.targets.mlx import config_json, examine, readme
from h1export.targets.mlx.check import check
from h1export.targets.mlx.fold import multiplier_of
from h1export.targets.mlx.options import MlxOptions
from h1export.targets.mlx.weights import DTYPES, float_tensor, quantization, quantized_tensor


class MlxTarget:
    """MLX: see Target."""

    name = "mlx"
    packages = ("ml-dtypes", "numpy", "torch")

    def lower(
        self,
        program: Program,
        store: WeightStore,
        integers: QuantizedWeights,
        *,
        options: MlxOptions,
        stage: Stage,
        progress: Progress,
    ) -> Lowered:
        config = program.config
        check(config, store, integers, options=options)
        settings = quantization(store, integers)
        progress.stage("weights", store.nbytes)
        dtype = DTYPES[options.compute]
        tensors = []
        stored = []
        for name in tensor_shapes(config):
            multiplier = multiplier_of(name, config)
            precision = integers.precisions.get(name)
            if precision is None:
                tensors.append(float_tensor(store, name, multiplier, dtype=dtype))
                continue
            tensors.append(quantized_tensor(store, integers, name, multiplier=multiplier, dtype=dtype))
            part = StoredPart(name, store.shape(name)[0], multiplier)
            stored.append(StoredWeight(name, precision.bits, precision.group_size, axis=0, parts=(part,)))
        first = write_shards(stage, tensors, {"format": "mlx"})
        config_json.write(stage.folder, config_json.config_json(config, options.compute, settings))
        readme.write(stage.folder, options)
        return Lowered(INPUTS, outputs(config, options.last_logits), tuple(stored), weights_file=first)

    def operations(self, artifact: Artifact) -> dict[str, dict[str, int]]:
        return dtype_counts(artifact)

    def examine(self, artifact: Artifact, *, build: bool, progress: Progress) -> Iterator[Finding]:
        return examine.examine(artifact)


target = MlxTarget()
