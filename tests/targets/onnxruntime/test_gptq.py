"""Ready-made GPTQ checkpoints: every graph computes what their integers mean, and holds them bit for bit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from gptq_files import Written, edit
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.store import WeightStore
from h1export.commands.build import build_artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array
from h1export.model.falcon_h1.tensors import EMBEDDING, LM_HEAD
from h1export.progress import SILENT
from h1export.quantize.scheme import QuantScheme
from h1export.report.checks import CheckKind
from h1export.report.report import Row
from h1export.targets.onnxruntime.options import OrtOptions
from h1export.targets.onnxruntime.variants import CPU, GRAPH_VARIANTS
from h1export.validate.accuracy.logits import relative_error
from h1export.validate.accuracy.run import ValidateOptions, validate
from h1export.validate.accuracy.weights import weight_errors

EXACT = 1e-5  # of the range: float32 against float32
IDS = np.random.default_rng(0).integers(0, 264, 24, dtype=np.int64)

Make = Callable[..., Written]
Logits = Callable[..., Any]
SHARED = {"self_attn.q_proj": "mamba.in_proj"}  # k_proj and v_proj have groups of their own


def built(written: Written, out: Path, chosen: dict[str, Any] | None = None, **options: Any) -> Artifact:
    scheme = QuantScheme("none", chosen=chosen or {})
    exact = {"accuracy_level": 0} | ({} if options.get("graph") == "cuda" else {"kv": "fp32"})
    return build_artifact(written.folder, "ort", out, scheme=scheme, options=OrtOptions(**exact | options))


def answer(artifact: Artifact, **loaded: Any) -> Array:
    """Logits of IDS in two calls."""
    loaded_runner = load_runner(artifact, **loaded)
    most = len(IDS) - 1
    first, states = loaded_runner.step(IDS[None, :most], np.ones((1, most), np.int64), loaded_runner.initial(1))
    last, _ = loaded_runner.step(IDS[None, most:], np.ones((1, len(IDS)), np.int64), states)
    return np.concatenate([first[0], last[0]])


def assert_own_integers(artifact: Artifact, written: Written) -> None:
    """Codes, zero points and scales are the writer's, in the artifact's order; dequantised, equal in every bit."""
    stored: Any = load_runner(artifact, float32=True).stored_weights()
    middle = 1 << (next(weight.bits for weight in artifact.manifest.weights) - 1)
    assert set(written.codes) <= set(stored)
    for name, codes in written.codes.items():
        found = stored.quantized(name)
        groups = written.g_idx[name]
        order = np.argsort(groups, kind="stable")
        of_block = groups[order][:: len(groups) // found.scales.shape[1]]
        np.testing.assert_array_equal(found.codes.astype(int) + middle, codes[:, order])
        np.testing.assert_array_equal(found.scales, written.scales[name][:, of_block])
        zeros = middle if found.zeros is None else found.zeros.astype(int) + middle
        np.testing.assert_array_equal(np.broadcast_to(zeros, found.scales.shape), written.zeros[name][:, of_block])
        np.testing.assert_array_equal(stored[name], written.weight(name))


HOWS = st.fixed_dictionaries(
    {
        "bits": st.sampled_from([4, 8]),
        "group": st.sampled_from([32, 64, 96, 128, -1]),
        "sym": st.booleans(),
        "v2": st.booleans(),
        "act_order": st.booleans(),
        "like": st.sampled_from(
            [{}, SHARED, SHARED | {"self_attn.k_proj": "mamba.in_proj", "self_attn.v_proj": "mamba.in_proj"}]
        ),
        "head": st.booleans(),
        "seed": st.integers(0, 2**32 - 1),
    }
)


@settings(deadline=None, max_examples=6, derandomize=True)
@given(how=HOWS, graph=st.sampled_from(["cpu", "portable"]))
def test_logits_are_those_of_the_writers_weights(
    how: dict[str, Any], graph: str, make_gptq: Make, gptq_logits: Logits
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = make_gptq(Path(folder, "in"), **how)
        artifact = built(written, Path(folder, "out"), graph=graph)
        truth = gptq_logits(written, IDS)
        for kernels in ("auto",) if graph == "portable" else ("native", "stock"):
            assert relative_error(answer(artifact, kernels=kernels), truth) <= EXACT
        assert_own_integers(artifact, written)


def test_biases_and_the_head_of_a_model_with_every_switch(make_gptq: Make, gptq_logits: Logits, tmp_path: Path) -> None:
    written = make_gptq(tmp_path / "in", "everything", sym=False, act_order=True, bits=8)
    truth = gptq_logits(written, IDS, "everything")
    assert relative_error(answer(built(written, tmp_path / "out"), kernels="stock"), truth) <= EXACT


def test_the_graph_for_cuda(
    make_gptq: Make, gptq_logits: Logits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GRAPH_VARIANTS, "cuda", replace(GRAPH_VARIANTS["cuda"], provider=CPU))
    written = make_gptq(tmp_path / "in", sym=False, act_order=True, group=64)
    artifact = built(written, tmp_path / "out", graph="cuda")
    assert relative_error(answer(artifact, float32=True), gptq_logits(written, IDS)) <= EXACT
    assert_own_integers(artifact, written)


def gathers(artifact: Artifact) -> int:
    """Of columns, in the graph."""
    nodes = ir.load(artifact.folder / "model.onnx").graph
    return sum(node.op_type == "Gather" and str(node.inputs[1].name).startswith("columns.") for node in nodes)


def test_products_share_a_gather_where_they_share_groups(make_gptq: Make, tmp_path: Path) -> None:
    one = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "mamba.in_proj")
    one["feed_forward.up_proj"] = "feed_forward.gate_proj"
    together = built(make_gptq(tmp_path / "a", act_order=True, like=one), tmp_path / "A")
    # the four of the mixers, the two of the gate, and out_proj, o_proj and down_proj with inputs of their own
    assert gathers(together) == 5
    assert len(together.manifest.weights) == 4  # out_proj and o_proj lie side by side
    apart = built(make_gptq(tmp_path / "b", act_order=True, like=SHARED), tmp_path / "B")
    assert gathers(apart) == 8
    assert len(apart.manifest.weights) == 7


@pytest.fixture(scope="module")
def asymmetric(make_gptq: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Written, Artifact]:
    """With an int8 head and embedding by a plan, shipped at level 4."""
    folder = tmp_path_factory.mktemp("asymmetric")
    written = make_gptq(folder / "in", sym=False, act_order=True)
    return written, built(written, folder / "out", {LM_HEAD: "int8", EMBEDDING: "int8"}, accuracy_level=4)


def rows(written: Written, artifact: Artifact) -> dict[CheckKind, Row]:
    shipped = load_runner(artifact)
    exact = load_runner(artifact, float32=True)
    report = validate(
        artifact, shipped, exact, checkpoint=written.folder, options=ValidateOptions(pairs=0), progress=SILENT
    )
    assert report.passed
    return {row.kind: row for row in report.rows}


def test_validate_passes_and_finds_no_difference(asymmetric: tuple[Written, Artifact]) -> None:
    judged = rows(*asymmetric)[CheckKind.STORED_INTEGERS]
    assert {judged.details[name] for name in asymmetric[0].codes} == {0.0}
    assert 0 < judged.details[LM_HEAD] <= 0.51  # rounded


def test_the_manifest_says_where_the_integers_are_from(asymmetric: tuple[Written, Artifact]) -> None:
    written, artifact = asymmetric
    scheme = artifact.manifest.scheme
    assert (scheme["quant"], scheme["method"]) == ("int4", "prequantized")
    assert scheme["prequantized"] == {"bits": 4, "group_size": 32, "sym": False, "zero_offset": 1}
    assert artifact.manifest.source == WeightStore.open(written.folder, artifact.config).fingerprint()


def test_one_changed_code_is_seen(asymmetric: tuple[Written, Artifact]) -> None:
    written, artifact = asymmetric
    stored: Any = load_runner(artifact).stored_weights()
    found = {name: np.array(stored[name]) for name in stored}
    name = "model.layers.0.mamba.out_proj.weight"
    found[name][3, 5] += written.scales[name][3, written.g_idx[name][5]]
    errors = weight_errors(found, artifact.manifest.weights, WeightStore.open(written.folder, artifact.config))
    assert [tensor for tensor, error in errors.items() if error["steps"] > 0.51] == [name]
    assert errors[name]["steps"] == float("inf")


@pytest.mark.parametrize(
    ("factor", "rounding", "seen"),
    [
        (1 + 2.0**-23, 0.0, True),
        (1.0, 0.0, False),
        (1 + 2.0**-11, 2.0**-11, False),  # µP inside scales of fp16 rounds them once more
        (1 + 2.0**-10, 2.0**-11, True),  # a scale that is off by a step
    ],
)
def test_integers_of_others_are_exact_but_for_the_rounding_of_a_runtime(
    factor: float, rounding: float, seen: bool, asymmetric: tuple[Written, Artifact]
) -> None:
    written, artifact = asymmetric
    stored: Any = load_runner(artifact).stored_weights()
    found = {name: stored[name] * np.float32(factor) for name in stored}
    store = WeightStore.open(written.folder, artifact.config)
    errors = weight_errors(found, artifact.manifest.weights, store, rounding=rounding)
    assert all((errors[name]["steps"] == float("inf")) is seen for name in store.packed)


def test_another_reading_of_zero_points_is_seen(
    asymmetric: tuple[Written, Artifact], gptq_logits: Logits, tmp_path: Path
) -> None:
    """The fault that text hides: every weight is off by one step."""
    written, _ = asymmetric
    folder = tmp_path / "in"
    folder.mkdir()
    for file in written.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"checkpoint_format": "gptq"', '"checkpoint_format": "gptq_v2"'))
    artifact = built(Written(folder), tmp_path / "out")
    assert relative_error(answer(artifact, kernels="stock"), gptq_logits(written, IDS)) > 1e-2


def test_a_choice_for_what_is_in_integers_already(make_gptq: Make, tmp_path: Path) -> None:
    written = make_gptq(tmp_path / "in")
    for scheme in (QuantScheme("int4"), QuantScheme("none", chosen={"model.layers.0.mamba.in_proj.weight": "int8"})):
        with pytest.raises(H1ExportError, match=r"in int4 already.*unquantised"):
            build_artifact(written.folder, "ort", tmp_path / "out", scheme=scheme)
    assert not (tmp_path / "out").exists()


def test_damage_that_only_reading_shows_leaves_nothing(make_gptq: Make, tmp_path: Path) -> None:
    written = make_gptq(tmp_path / "in")
    edit(written.folder, lambda tensors: tensors["model.layers.0.mamba.out_proj.scales"].put(5, np.nan))
    with pytest.raises(H1ExportError, match="positive and finite"):
        built(written, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
