"""The target "gptq": a Hugging Face folder whose projections are integers in GPTQ's layout."""

from __future__ import annotations

from collections.abc import Iterator

from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import StoredPart, StoredWeight
from h1export.artifact.stage import Stage
from h1export.checkpoint.packed_format import QUANTIZATION_CONFIG
from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.weight_expr import Multiplier
from h1export.graphs.program import Program
from h1export.model.falcon_h1.tensors import EMBEDDING, tensor_shapes
from h1export.progress import Progress
from h1export.quantize.choices import AUTO
from h1export.quantize.source import QuantizedWeights
from h1export.targets.base import Finding, Lowered
from h1export.targets.gptq import examine, readme
from h1export.targets.gptq.options import GptqOptions
from h1export.targets.gptq.packed_set import PackedSet
from h1export.targets.gptq.weights import float_tensor, packed_tensors
from h1export.targets.hf_folder.config_json import write_config
from h1export.targets.hf_folder.ports import INPUTS, outputs
from h1export.targets.hf_folder.shards import Stored, dtype_counts, write_shards

HALF = "F16"


class GptqTarget:
    """GPTQ folders: see Target."""

    name = "gptq"
    packages = ("numpy", "torch")

    def lower(
        self,
        program: Program,
        store: WeightStore,
        integers: QuantizedWeights,
        *,
        options: GptqOptions,
        stage: Stage,
        progress: Progress,
    ) -> Lowered:
        config = program.config
        chosen = PackedSet.of(store, integers, config, options=options)
        progress.stage("weights", store.nbytes)
        tensors: list[Stored] = []
        for name in tensor_shapes(config):
            if name in chosen.tensors:
                tensors += packed_tensors(store, integers, name)
            else:
                tensors.append(
                    float_tensor(store, name, HALF if name == EMBEDDING and options.embedding != AUTO else "")
                )
        first = write_shards(stage, tensors, {"format": "pt"})
        quantization = chosen.quantization_config(config)
        write_config(stage.folder, {QUANTIZATION_CONFIG: quantization} if quantization else {})
        readme.write(stage.folder, chosen)
        stored = tuple(_stored_weight(name, store, chosen) for name in chosen.tensors)
        return Lowered(INPUTS, outputs(config, options.last_logits), stored, weights_file=first)

    def operations(self, artifact: Artifact) -> dict[str, dict[str, int]]:
        return dtype_counts(artifact)

    def examine(self, artifact: Artifact, *, build: bool, progress: Progress) -> Iterator[Finding]:
        return examine.examine(artifact)


def _stored_weight(name: str, store: WeightStore, chosen: PackedSet) -> StoredWeight:
    assert chosen.precision is not None
    part = StoredPart(name, store.shape(name)[0], Multiplier())
    module = name.removesuffix(".weight")
    return StoredWeight(module, chosen.precision.bits, chosen.precision.group_size, axis=0, parts=(part,))


target = GptqTarget()
