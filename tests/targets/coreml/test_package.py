"""Properties of the package on disk that a refactoring must keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import MANIFEST
from h1export.checkpoint.store import WeightStore
from h1export.commands.build import build_artifact
from h1export.commands.load import load_runner
from h1export.commands.plan import plan_build
from h1export.errors import H1ExportError
from h1export.graphs.verify import LEGAL_OPS
from h1export.model.falcon_h1.tensors import tensor_shapes
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.scheme import QuantScheme
from h1export.targets import get_target
from h1export.targets.coreml import sdk
from h1export.targets.coreml.evaluator import Package
from h1export.targets.coreml.options import CoreMLOptions
from h1export.targets.coreml.program import layout
from h1export.targets.coreml.program.ops import TABLE, UNUSED

Build = Callable[..., Artifact]


def operations(artifact: Artifact, function: str) -> list[Any]:
    return list(Package.open(artifact.folder / layout.PACKAGE).functions[function].block.walk())


def test_the_table_is_the_legal_vocabulary_but_for_what_is_never_reached() -> None:
    assert not TABLE.keys() & UNUSED
    assert TABLE.keys() | UNUSED == LEGAL_OPS


@pytest.mark.parametrize("function", ["decode", "prefill"])
def test_one_kernel_a_layer(function: str, tiny: Path, build: Build) -> None:
    artifact = build(tiny, "int4", target="coreml", max_context=192)
    layers = artifact.config.num_hidden_layers
    counts = Counter(get_target("coreml").operations(artifact)[function])
    assert counts["scaled_dot_product_attention"] == layers
    assert counts["slice_update"] == 2 * layers
    assert counts["linear"] == counts["constexpr_blockwise_shift_scale"] == 9 * layers + 1
    assert (
        counts["write_state"] == 5 * layers
    )  # keys, values, the convolution's inputs, and the two halves of the scan's state
    assert counts["while_loop"] == 0  # neither the GPU nor the Neural Engine takes one


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_the_integers_are_those_of_the_rule(quant: str, checkpoint: Path, build: Build) -> None:
    artifact = build(checkpoint, quant, target="coreml", max_context=192)
    store = WeightStore.open(checkpoint, artifact.config)
    stored = load_runner(artifact).stored_weights()
    assert len(stored) >= 9 * artifact.config.num_hidden_layers + 1 - artifact.config.tie_word_embeddings
    for name in stored:
        precision = QuantScheme(quant).precision(name, artifact.config)  # type: ignore[arg-type]
        assert precision is not None
        rows = store.shape(name)[0]
        # type: ignore[attr-defined]
        expected = quantize_rows(store.rows(name, 0, rows), precision, np.ones(rows, np.float32))
        found = stored.quantized(name)
        np.testing.assert_array_equal(found.codes, expected.codes)
        np.testing.assert_array_equal(found.scales, expected.scales)


def test_both_functions_read_the_same_bytes(tiny: Path, build: Build) -> None:
    artifact = build(tiny, "int4", target="coreml", max_context=192)

    def offsets(function: str) -> dict[str, int]:
        found = {}
        for operation in operations(artifact, function):
            values = [
                *operation.attributes.items(),
                *((key, a) for key, many in operation.inputs.items() for a in many),
            ]
            for key, value in values:
                if (blob := getattr(value, "blob", None)) is not None and (
                    "layers" in operation.name or "model" in operation.name
                ):
                    found[f"{operation.name}.{key}"] = blob.offset
        return found

    decode = offsets("decode")
    prefill = offsets("prefill")
    assert len(decode) > 20 * artifact.config.num_hidden_layers
    assert decode == prefill


def test_the_weights_file_is_near_its_ideal(tiny: Path, build: Build) -> None:
    """The file has int4 codes with a 16-bit scale per group, and fp16 for weights that are not quantised.

    The rest is records, tables and the scan's float32.
    """
    artifact = build(tiny, "int4", target="coreml", max_context=192)
    stored = set(load_runner(artifact).stored_weights())
    ideal = sum(
        (4 + 16 / 32 if name in stored else 16) / 8 * prod(shape)
        for name, shape in tensor_shapes(artifact.config).items()
    )
    assert artifact.manifest.files[layout.WEIGHTS][1] <= 1.05 * ideal


def test_two_builds_give_the_same_bytes(tiny: Path, build: Build, tmp_path: Path) -> None:
    first = build(tiny, "int4", target="coreml", max_context=192)
    options = CoreMLOptions(max_context=192)
    second = build_artifact(tiny, "coreml", tmp_path / "elsewhere", options=options, jobs=1)
    assert first.manifest == second.manifest


def test_a_plan_knows_every_byte(tiny: Path, build: Build, tmp_path: Path) -> None:
    artifact = build(tiny, "int4", target="coreml", max_context=192)
    planned = plan_build(
        tiny, "coreml", tmp_path / "planned", scheme=QuantScheme(), options=CoreMLOptions(max_context=192)
    )
    sizes = {name: size for name, (_, size) in artifact.manifest.files.items()}
    assert {name: size for name, size in planned.files.items() if name != MANIFEST} == sizes


def test_coremltools_reads_and_validates_the_package(tiny: Path, build: Build) -> None:
    artifact = build(tiny, "int4", target="coreml", max_context=192)
    folder = artifact.folder / layout.PACKAGE
    model = sdk.coremltools().models.MLModel(str(folder), skip_model_load=True)
    loader = sdk.module("coremltools.converters.mil.frontend.milproto.load")
    program = loader.load(model.get_spec(), specification_version=9, file_weights_dir=model.weights_dir)
    program.validate()
    assert set(program.functions) == {"decode", "prefill"}


def test_a_context_shorter_than_a_prefill_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(H1ExportError, match=r"--max-context.*65 or more"):
        build_artifact(tiny, "coreml", tmp_path / "out", options=CoreMLOptions(max_context=64))
    assert not (tmp_path / "out").exists()
