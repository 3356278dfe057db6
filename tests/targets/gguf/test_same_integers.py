"""The file's integers are those of the artifact for ONNX Runtime, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from h1export.artifact import staging
from h1export.artifact.artifact import Artifact
from h1export.artifact.stage import dry_stage
from h1export.commands.build import BuildJob, build_artifact
from h1export.commands.load import load_runner
from h1export.model.falcon_h1.tensors import projection_of
from h1export.progress import SILENT
from h1export.quantize.calibration import Calibration
from h1export.quantize.scheme import QuantScheme
from h1export.targets.gguf import read_back
from h1export.targets.gguf.read_back import GgufFile, StoredWeights
from h1export.targets.gguf.target import OWN_INTEGERS
from h1export.targets.gguf.tensors import GgufTensor
from h1export.targets.gguf.writer import MODEL

Build = Callable[..., Artifact]
SAME = {"head": "q4_0", "embedding": "q8_0"}  # what a build with int4 has


def tensors(artifact: Artifact) -> StoredWeights:
    """Return what the file stores, without llama.cpp."""
    return StoredWeights(artifact)


@pytest.mark.parametrize(("quant", "group_size"), [("int4", 32), ("int4", 64), ("int8", 32)])
def test_codes_and_scales_are_those_of_onnx_runtimes_artifact(
    quant: str, group_size: int, tiny: Path, build: Build
) -> None:
    chosen = SAME if quant == "int4" else {}
    compare(
        tensors(build(tiny, quant, group_size, target="gguf", **chosen)),
        load_runner(build(tiny, quant, group_size)).stored_weights(),
    )


def test_integers_of_gptq_are_the_same_too(spoken_checkpoint: Path, build: Build) -> None:
    theirs = load_runner(build(spoken_checkpoint, "int4", method="gptq")).stored_weights()
    compare(tensors(build(spoken_checkpoint, "int4", target="gguf", method="gptq", **SAME)), theirs)


def compare(ours: StoredWeights, theirs: Any) -> None:
    assert set(ours) == set(theirs)
    parts = {weight.parts[0].tensor: weight.parts[0] for weight in ours.weights}
    for name in ours:
        found, expected = ours.quantized(name), theirs.quantized(name)
        np.testing.assert_array_equal(found.codes, expected.codes, err_msg=name)
        factors = parts[name].multiplier.rows(len(found.codes)).astype(np.float64)
        scales = (expected.scales.astype(np.float64) * factors[:, None]).astype(np.float16)
        repeated = np.repeat(scales, found.scales.shape[1] // scales.shape[1], axis=1)
        np.testing.assert_array_equal(found.scales, repeated, err_msg=name)


def test_the_default_names_the_integers_of_its_own(tiny: Path, build: Build) -> None:
    artifact = build(tiny, "int4", target="gguf")
    theirs: Any = load_runner(build(tiny, "int4")).stored_weights()
    ours = tensors(artifact)
    own = artifact.manifest.requirements[OWN_INTEGERS]
    assert sorted(own) == ["output.weight", "token_embd.weight"]
    file = GgufFile(artifact.folder / MODEL)
    assert list(file.strings("h1export.own_integers")) == own
    assert file.counts == {"q4_0": 36, "q6_k": 2, "f32": len(file.kinds) - 38}
    for weight in ours.weights:
        name = weight.parts[0].tensor
        if weight.initializer not in own:
            np.testing.assert_array_equal(ours.quantized(name).codes, theirs.quantized(name).codes)


@pytest.mark.parametrize("name", ["plain", "tied", "expand"])
def test_multipliers_of_floats_are_those_of_the_passes(
    name: str, make_checkpoint: Callable[..., Path], build: Build
) -> None:
    artifact = build(make_checkpoint(name), "int4", target="gguf")
    for weight in artifact.manifest.weights:
        (part,) = weight.parts
        projection = projection_of(part.tensor)
        assert projection is not None
        found = read_back._multiplier(projection, artifact.config).rows(part.size)
        np.testing.assert_allclose(found, part.multiplier.rows(part.size), rtol=1e-6, err_msg=part.tensor)


def test_two_builds_have_the_same_bytes_and_gguf_reads_them(tiny: Path, build: Build, tmp_path: Path) -> None:
    first = build(tiny, "int4", target="gguf")
    second = build_artifact(tiny, "gguf", tmp_path / "again", scheme=QuantScheme("int4"), jobs=3)
    assert second.manifest.files == first.manifest.files
    reader = gguf.GGUFReader(first.folder / MODEL)
    assert reader.fields["general.architecture"].contents() == "falcon-h1"
    assert reader.fields["falcon-h1.ssm.group_count"].contents() == 2
    ends = [int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors]
    assert max(ends) <= (first.folder / MODEL).stat().st_size < max(ends) + 32


def test_a_plan_has_the_size_of_the_build(tiny: Path, build: Build) -> None:
    job = BuildJob.open(tiny, "gguf", scheme=QuantScheme("int4"), options=None, calibration=Calibration())
    with dry_stage() as stage:
        planned = job.write(job.manifest("0" * 64), stage, SILENT)
    built = build(tiny, "int4", target="gguf").manifest
    assert {n: s for n, (_, s) in planned.files.items()} == {n: s for n, (_, s) in built.files.items()}


def test_a_killed_build_goes_on(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors that were written before the kill are not computed again, and the bytes are those of one go."""
    checkpoint = make_checkpoint()
    whole = build_artifact(checkpoint, "gguf", tmp_path / "whole", scheme=QuantScheme("int8"))
    blocks = GgufTensor.row_blocks
    seen: list[str] = []

    def stopping(tensor: GgufTensor, *args: Any) -> Iterator[Any]:
        seen.append(tensor.name)
        if len(seen) == 20:
            monkeypatch.setattr(staging, "_is_at", lambda *_: False)  # nothing is cleaned up, as after a kill
            raise KeyboardInterrupt
        return blocks(tensor, *args)

    def counting(tensor: GgufTensor, *args: Any) -> Iterator[Any]:
        for block in blocks(tensor, *args):
            seen.append(tensor.name)
            yield block

    monkeypatch.setattr(GgufTensor, "row_blocks", stopping)
    with pytest.raises(KeyboardInterrupt):
        build_artifact(checkpoint, "gguf", tmp_path / "out", scheme=QuantScheme("int8"))
    assert not (tmp_path / "out").exists()
    first = seen[:19]
    seen.clear()
    monkeypatch.undo()
    monkeypatch.setattr(GgufTensor, "row_blocks", counting)
    again = build_artifact(checkpoint, "gguf", tmp_path / "out", scheme=QuantScheme("int8"))
    assert again.manifest.files == whole.manifest.files
    assert seen
    assert not set(seen) & set(first)
