"""The target "coreml": an ML program with a decode and a prefill function over one set of weights and states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from h1export.artifact.artifact import Artifact
from h1export.artifact.stage import Stage
from h1export.artifact.weight_file import in_order
from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.graphs.interpret import forward
from h1export.graphs.passes import passes_for, run_passes
from h1export.graphs.program import Program
from h1export.graphs.trace import trace
from h1export.progress import Progress
from h1export.quantize.source import QuantizedWeights
from h1export.targets.base import Finding, Lowered
from h1export.targets.coreml import examine, sdk
from h1export.targets.coreml.evaluator import Package
from h1export.targets.coreml.mac import golden, readme
from h1export.targets.coreml.mac.verify_on_mac import Settings
from h1export.targets.coreml.options import Compute, CoreMLOptions
from h1export.targets.coreml.package import writer
from h1export.targets.coreml.program import layout
from h1export.targets.coreml.program.blob_storage import BlobStorage
from h1export.targets.coreml.program.functions import mil_program
from h1export.targets.coreml.program.layout import CALLS, PREFILL
from h1export.targets.coreml.program.weights import Float, Var, Weights

COMPUTE: Mapping[Compute, Float] = {"fp16": np.float16, "fp32": np.float32}
Port = tuple[str, tuple[int | str, ...]]
Ports = Mapping[str, Port]


class CoreMLTarget:
    """CoreML: see Target."""

    name = "coreml"
    packages = ("coremltools", "numpy", "torch")

    def lower(
        self,
        program: Program,
        store: WeightStore,
        integers: QuantizedWeights,
        *,
        options: CoreMLOptions,
        stage: Stage,
        progress: Progress,
    ) -> Lowered:
        _check(options)
        sdk.coremltools()
        (stage.folder / layout.WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
        with BlobStorage(stage, layout.WEIGHTS) as blobs:
            weights = Weights(
                store,
                integers,
                program.config,
                blobs=blobs,
                compute=COMPUTE[options.compute],
                embedding=options.embedding,
            )
            built = mil_program(program, weights, CALLS, max_context=options.max_context, state_io=options.state_io)
            progress.stage("weights", store.nbytes)
            notes = {layout.MAX_CONTEXT: str(options.max_context), layout.PREFILL_TOKENS: str(PREFILL.tokens)}
            model = writer.protobuf(built, weights, notes)
            blobs.finish()
        writer.write(stage.folder, model)
        _write_mac_files(program, weights, options, stage=stage, progress=progress)
        inputs, outputs = _ports(built)
        return Lowered(inputs, outputs, tuple(weights.stored), weights_file=layout.WEIGHTS)

    def operations(self, artifact: Artifact) -> dict[str, dict[str, int]]:
        functions = Package.open(artifact.folder / layout.PACKAGE).functions
        return {
            name: dict(Counter(operation.type for operation in function.block.walk()))
            for name, function in functions.items()
        }

    def examine(self, artifact: Artifact, *, build: bool, progress: Progress) -> Iterator[Finding]:
        return examine.examine(artifact)


def _check(options: CoreMLOptions) -> None:
    if options.max_context <= PREFILL.tokens:
        what = f"{options.max_context} has no room for a prefill of {PREFILL.tokens} tokens and one after it"
        raise H1ExportError("--max-context", what, f"{PREFILL.tokens + 1} or more")


def _write_mac_files(
    program: Program, weights: Weights, options: CoreMLOptions, *, stage: Stage, progress: Progress
) -> None:
    """Write the files that check the package on a Mac.

    The expected logits are those of the graph in float32 on the weights that the package stores.
    """
    prompts = golden.lengths(PREFILL.tokens, options.max_context)
    vocab = program.config.vocab_size
    positions = golden.logit_positions(prompts, PREFILL.tokens)
    ids = np.random.default_rng(0).integers(0, vocab, max(prompts) + golden.STEPS, dtype=np.int64)
    logits = np.zeros((len(positions), vocab), np.float32)
    if not stage.dry:
        progress.stage("golden logits", weights.nbytes)
        every = (
            run_passes(trace(program.config), passes_for(weights.store.order_name)) if options.last_logits else program
        )
        logits = forward(every, weights.store, lambda expr: in_order(weights.stored_blocks(expr), stage.jobs), ids=ids)[
            positions
        ]
    settings = Settings(options.max_context, PREFILL.tokens, state_io=options.state_io, last_logits=options.last_logits)
    readme.write(stage.folder, settings, golden.golden(ids, logits, prompts, positions=positions))


def _ports(built: Any) -> tuple[Ports, Ports]:
    """Inputs and outputs by "function.name", states among the inputs."""
    inputs: dict[str, Port] = {}
    outputs: dict[str, Port] = {}
    for name, function in built.functions.items():
        inputs |= {f"{name}.{port}": _port(var) for port, var in function.inputs.items()}
        outputs |= {f"{name}.{var.name}": _port(var) for var in function.outputs}
    return inputs, outputs


def _port(var: Var) -> Port:
    types = sdk.mil().types
    names = {types.fp16: "FLOAT16", types.fp32: "FLOAT", types.int32: "INT32"}
    return names[var.dtype], tuple(map(int, var.shape))


target = CoreMLTarget()
