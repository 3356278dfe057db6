"""--mix: llama.cpp's types matrix by matrix, in no more bytes than its own file, solved by GPTQ or rounded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published_configs import PUBLISHED

from h1export.artifact import staging
from h1export.artifact.artifact import Artifact
from h1export.checkpoint.store import WeightStore
from h1export.commands.build import build_artifact
from h1export.commands.plan import plan_build
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.quantize.calibration import Calibration
from h1export.quantize.methods import solved_file
from h1export.quantize.scheme import QuantScheme
from h1export.targets.gguf.file_types import BASE, file_bytes, matrices, type_of
from h1export.targets.gguf.mix import mixed
from h1export.targets.gguf.options import GgufOptions
from h1export.targets.gguf.read_back import GgufFile
from h1export.targets.gguf.target import OWN_INTEGERS
from h1export.targets.gguf.types import TensorType
from h1export.targets.gguf.writer import MODEL

Build = Callable[..., Artifact]
# the widths of blocks of 256 columns, and of 32 alone (down_proj and out_proj)
RAISED = "model.layers.0.mamba.in_proj.weight"
WIDE = {"hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 8, "vocab_size": 512}


def own_bytes(config: FalconH1Config, file_type: str) -> int:
    kinds = mixed(file_type, config)
    return sum(matrix.rows * kinds[matrix.tensor].row_bytes(matrix.columns) for matrix in matrices(config))


@pytest.mark.parametrize("file_type", ["q4_k_m", "q5_k_m"])
@pytest.mark.parametrize("name", ["embedded", *sorted(PUBLISHED)])
def test_a_mix_has_no_more_bytes_than_llama_cpps_file(name: str, file_type: str, tiny: Path, tmp_path: Path) -> None:
    folder = tiny
    if name != "embedded":
        folder = tmp_path
        (folder / "config.json").write_text(json.dumps(PUBLISHED[name]))
    config = FalconH1Config.load(folder)
    theirs = file_bytes(file_type, config)
    assert 0.97 * theirs < own_bytes(config, file_type) <= theirs


def test_llama_cpps_types_are_those_of_files_that_its_quantizer_wrote(tiny: Path) -> None:
    """The sizes are those of files by llama_model_quantize in November 2026, without keys and floats."""
    config = FalconH1Config.load(tiny)
    assert {kind: round(file_bytes(kind, config) / 1e6, 3) for kind in BASE} == {
        "q4_0": 3.370,
        "iq4_nl": 3.370,
        "q4_k_m": 3.559,
        "q5_k_m": 4.047,
    }
    kinds = Counter(type_of(matrix, "q4_k_m", config) for matrix in matrices(config))
    assert kinds == {"Q4_K": 27, "Q5_0": 6, "Q6_K": 3, "Q8_0": 2}


def test_the_file_has_the_types_of_the_mix_and_names_its_own_integers(rounded: Artifact) -> None:
    file = GgufFile(rounded.folder / MODEL)
    expected = mixed("q4_k_m", rounded.config) | {RAISED: TensorType.Q8_0}
    kinds = {matrix.name: expected[matrix.tensor] for matrix in matrices(rounded.config)}
    assert {name: file.kind(name) for name in kinds} == kinds
    own = [name for name in file.kinds if name in kinds and kinds[name] is not TensorType.Q8_0]
    assert rounded.manifest.requirements[OWN_INTEGERS] == list(file.strings("h1export.own_integers")) == own
    assert len(own) == len(kinds) - 1


def test_a_plan_has_the_size_and_the_precisions_of_the_build(rounded: Artifact, wide: Path, tmp_path: Path) -> None:
    scheme = QuantScheme("int4", chosen={RAISED: "int8"})
    plan = plan_build(wide, "gguf", tmp_path, scheme=scheme, options=GgufOptions(mix="q4_k_m"))
    sizes = {name: size for name, (_, size) in rounded.manifest.files.items()}
    assert {name: plan.files[name] for name in sizes} == sizes
    for tensor, kind in (mixed("q4_k_m", rounded.config) | {RAISED: TensorType.Q8_0}).items():
        assert plan.precisions[tensor].startswith(f"int{kind[1]}, "), tensor


@pytest.fixture(scope="module")
def rounded(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """In the mix, rounded without a text; a plan of precisions has one matrix in int8."""
    scheme = QuantScheme("int4", chosen={RAISED: "int8"})
    out = tmp_path_factory.mktemp("rounded") / "out"
    return build_artifact(wide, "gguf", out, scheme=scheme, options=GgufOptions(mix="q4_k_m"))


@pytest.fixture(scope="module")
def wide(make_spoken: Callable[..., Path]) -> Path:
    """A random model with a tokenizer, to which every type of a mix fits somewhere."""
    return make_spoken(**WIDE)


@pytest.fixture(scope="module")
def solved(wide: Path, build: Build) -> Artifact:
    return build(wide, "int4", target="gguf", method="gptq", mix="q4_k_m")


def test_gptq_solves_in_the_types_of_the_file(
    solved: Artifact, rounded: Artifact, wide: Path, worst: Callable[..., tuple[float, float]]
) -> None:
    """The same types as by rounding, other integers, and llama.cpp computes what transformers does with them."""
    file, plain = (GgufFile(artifact.folder / MODEL) for artifact in (solved, rounded))
    assert {"q4_k", "q5_k", "q5_0"} <= set(file.counts)
    for matrix in matrices(solved.config):
        if matrix.tensor == RAISED:
            continue
        assert file.kind(matrix.name) == plain.kind(matrix.name)
        same = np.array_equal(file.rows(matrix.name), plain.rows(matrix.name))
        assert same == (matrix.name == "token_embd.weight"), matrix.name  # no product reads it
    assert max(worst(solved, wide)) <= 1e-5


def test_a_killed_build_goes_on_with_the_same_bytes(
    solved: Artifact, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = solved_file.solve_own_rows
    seen: list[str] = []

    def stopping(*args: Any, name: str) -> Any:
        seen.append(name)
        if len(seen) == 5:
            monkeypatch.setattr(staging, "_is_at", lambda *_: False)  # nothing is cleaned up, as after a kill
            raise KeyboardInterrupt
        return solve(*args, name=name)

    def again() -> Artifact:
        scheme = QuantScheme("int4", method="gptq")
        options = GgufOptions(mix="q4_k_m")
        return build_artifact(
            wide,
            "gguf",
            tmp_path / "out",
            scheme=scheme,
            options=options,
            calibration=Calibration(samples=4, length=256),
            jobs=1,
        )

    monkeypatch.setattr(solved_file, "solve_own_rows", stopping)
    with pytest.raises(KeyboardInterrupt):
        again()
    first = set(seen[:4])
    seen.clear()
    monkeypatch.undo()
    monkeypatch.setattr(solved_file, "solve_own_rows", lambda *a, name: (seen.append(name), solve(*a, name=name))[1])
    assert again().manifest.files == solved.manifest.files
    assert seen
    assert not set(seen) & first


def test_a_mix_is_for_int4_builds(
    make_spoken: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WeightStore, "rows", lambda *_: pytest.fail("a weight was read"))
    options = GgufOptions(mix="q4_k_m")
    with pytest.raises(H1ExportError, match="the build is not in int4") as caught:
        build_artifact(make_spoken(**WIDE), "gguf", tmp_path / "out", scheme=QuantScheme("int8"), options=options)
    assert caught.value.where == "--mix q4_k_m"
    assert not (tmp_path / "out").exists()


def test_a_mix_is_not_for_integers_of_the_checkpoint(make_gptq: Callable[..., Any], tmp_path: Path) -> None:
    written = make_gptq(tmp_path / "packed", bits=4)
    with pytest.raises(H1ExportError, match="has integers of its own"):
        build_artifact(
            written.folder,
            "gguf",
            tmp_path / "out",
            scheme=QuantScheme("none"),
            options=GgufOptions(mix="q4_k_m"),
        )
