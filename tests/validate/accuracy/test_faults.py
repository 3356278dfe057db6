"""Planted faults: an artifact with one fault must fail the default tolerances, and bisect must name the fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.progress import SILENT
from h1export.report.checks import CheckKind, Comparison, Phase
from h1export.report.report import Report, Row, Verdict
from h1export.targets import Kernels
from h1export.validate.accuracy import tolerances
from h1export.validate.accuracy.bisect import bisect
from h1export.validate.accuracy.reference import Reference
from h1export.validate.accuracy.run import ValidateOptions, validate

pytestmark = pytest.mark.ort
Build = Callable[..., Artifact]
MakeCheckpoint = Callable[..., Path]

# config key, or key and place in its list -> what bisect says of an artifact without the multiplier
MULTIPLIERS: dict[Any, str] = {
    "embedding_multiplier": "embedding (at embedding)",
    "lm_head_multiplier": "final norm or lm_head (at logits)",
    "key_multiplier": "layer 0, k_proj (at 0.key)",
    "attention_in_multiplier": "layer 0, q_proj (at 0.query)",
    "attention_out_multiplier": "layer 0, out_proj or o_proj (at 0.mixed)",
    "ssm_in_multiplier": "layer 0, in_proj (at 0.gate)",
    "ssm_out_multiplier": "layer 0, out_proj or o_proj (at 0.mixed)",
    ("ssm_multipliers", 0): "layer 0, in_proj (at 0.gate)",
    **{("ssm_multipliers", i): "layer 0, in_proj (at 0.conv_input)" for i in (1, 2, 3)},
    ("ssm_multipliers", 4): "layer 0, in_proj (at 0.dt)",
    ("mlp_multipliers", 0): "layer 0, gate_proj or up_proj (at 0.product)",
    ("mlp_multipliers", 1): "layer 0, down_proj (at 0.output)",
}
MLP = "gate_proj, up_proj or down_proj"  # of integers, one kernel of ours computes what follows gate_proj and up_proj


def judge(
    artifact: Artifact, checkpoint: Path, runner: Any = None, kernels: Kernels = "auto", *, quick: bool = False
) -> Report:
    """``quick``: for faults of weights, which any case shows."""
    exact = runner or load_runner(artifact, float32=True, kernels=kernels)
    shipped = runner or load_runner(artifact, kernels=kernels)
    return validate(
        artifact,
        shipped,
        exact,
        checkpoint=checkpoint,
        options=ValidateOptions(pairs=0, bisect=True, quick=quick),
        progress=SILENT,
    )


def failed(report: Report) -> list[Row]:
    """The rows of cases that fail."""
    assert not report.passed
    return [
        row
        for row in report.rows
        if row.verdict is Verdict.FAIL and row.kind not in (CheckKind.BISECT, CheckKind.BISECT_INTEGERS)
    ]


def named(report: Report, phase: Phase = Phase.PREFILL) -> str:
    """What bisect names as wrong first."""
    (row,) = [row for row in report.rows if row.kind is CheckKind.BISECT and row.phase is phase]
    assert row.verdict is Verdict.FAIL
    return row.note.removeprefix("first beyond tolerance: ")


def edited_config(checkpoint: Path, folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of ``checkpoint`` whose config.json says something else."""
    wrong = Path(shutil.copytree(checkpoint, folder / "wrong"))
    config = json.loads((wrong / "config.json").read_text())
    edit(config)
    (wrong / "config.json").write_text(json.dumps(config))
    return wrong


def edited_graph(
    artifact: Artifact, folder: Path, edit: Callable[[onnx.ModelProto], None], name: str = "model.onnx"
) -> Artifact:
    """A copy of ``artifact`` with another graph; the manifest keeps up with the size."""
    copy = Path(shutil.copytree(artifact.folder, folder / "edited"))
    model = onnx.load(copy / name, load_external_data=False)
    edit(model)
    onnx.save(model, copy / name)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][name][1] = (copy / name).stat().st_size
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return Artifact.open(copy)


@pytest.mark.parametrize(
    ("key", "quant", "level"),
    [
        *((key, "none", 0) for key in MULTIPLIERS),
        # beside integers, one of each place where the graph keeps a multiplier
        *((key, "int4", 4) for key in ("embedding_multiplier", "ssm_out_multiplier", ("ssm_multipliers", 1))),
        (("mlp_multipliers", 0), "int4", 4),
    ],
    ids=str,
)
def test_a_dropped_multiplier_fails(
    key: Any, quant: str, level: int, make_checkpoint: MakeCheckpoint, build: Build, tmp_path: Path
) -> None:
    def drop(config: dict[str, Any]) -> None:
        if isinstance(key, str):
            config[key] = 1.0
        else:
            config[key[0]][key[1]] = 1.0

    truth = make_checkpoint()
    artifact = build(edited_config(truth, tmp_path, drop), quant, accuracy_level=level)
    comparison = Comparison.SOURCE if quant == "none" else Comparison.STORED
    report = judge(artifact, truth, quick=True)
    assert any(row.comparison is comparison for row in failed(report))
    fused = quant == "int4" and key[0] == "mlp_multipliers"
    assert named(report) == (f"layer 0, {MLP} (at 0.output)" if fused else MULTIPLIERS[key])


def test_a_wrong_rope_base_fails(make_checkpoint: MakeCheckpoint, build: Build, tmp_path: Path) -> None:
    truth = make_checkpoint()
    artifact = build(edited_config(truth, tmp_path, lambda config: config["rope_parameters"].update(rope_theta=1e10)))
    report = judge(artifact, truth)
    rows = failed(report)
    assert named(report) == "layer 0, rotary embedding (at 0.key added)"
    assert "one token" not in {row.case for row in rows}  # position 0 does not turn
    assert "512 decode steps" in {row.case for row in rows}


def scan_of_layer_1(model: onnx.ModelProto) -> onnx.NodeProto:
    return [node for node in model.graph.node if node.op_type == "LinearAttention"][1]


def swap_b_and_c(model: onnx.ModelProto) -> None:
    node = scan_of_layer_1(model)
    node.input[0], node.input[1] = node.input[1], node.input[0]


def swap_groups(model: onnx.ModelProto) -> None:
    """B of one group goes to the heads of the other."""
    node = scan_of_layer_1(model)
    split = onnx.helper.make_node("Split", [node.input[1]], ["fault.first", "fault.second"], axis=-1, num_outputs=2)
    joined = onnx.helper.make_node("Concat", ["fault.second", "fault.first"], ["fault.swapped"], axis=-1)
    place = list(model.graph.node).index(node)
    node.input[1] = "fault.swapped"
    for added in (joined, split):
        model.graph.node.insert(place, added)


@pytest.mark.parametrize(("edit", "model"), [(swap_b_and_c, "plain"), (swap_groups, "norm_after_gate_two_groups")])
def test_a_scan_of_the_wrong_inputs_fails(
    edit: Callable[[onnx.ModelProto], None], model: str, make_checkpoint: MakeCheckpoint, build: Build, tmp_path: Path
) -> None:
    truth = make_checkpoint(model)
    report = judge(edited_graph(build(truth), tmp_path, edit), truth, kernels="stock")
    assert failed(report)
    assert named(report) == "layer 1, scan or its gate (at 1.gated)"


def test_a_convolution_off_by_one_fails(make_checkpoint: MakeCheckpoint, build: Build, tmp_path: Path) -> None:
    def rotate(model: onnx.ModelProto) -> None:
        names = {
            f"model.layers.1.mamba.conv1d.weight.taps.{tap}": f"model.layers.1.mamba.conv1d.weight.taps.{(tap + 1) % 4}"
            for tap in range(4)
        }
        for node in model.graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]

    truth = make_checkpoint()
    report = judge(edited_graph(build(truth), tmp_path, rotate), truth, kernels="stock")
    assert failed(report)
    assert named(report) == "layer 1, convolution (at 1.conv)"


# op of ours, which of them, and a change of its attributes -> what bisect says; layer 0 has as many of each op
NATIVE: dict[tuple[str, int, str], tuple[Callable[[float], float], str]] = {
    ("CausalConv", 1, "offset"): (lambda offset: offset - 1, "layer 1, convolution (at 1.conv)"),
    ("SSMScan", 1, "dt_offset"): (lambda offset: offset + 1, "layer 1, scan or its gate (at 1.gated)"),
    ("SSMScan", 1, "gate_offset"): (lambda offset: offset + 1, "layer 1, scan or its gate (at 1.gated)"),
    ("Attention", 1, "scale"): (lambda scale: scale * 1.01, "layer 1, attention (at 1.attended)"),
    ("Attention", 1, "k_offset"): (lambda offset: offset - 1, "layer 1, key cache (at 1.key added)"),
    ("PairQMatMul", 1, "b_factor"): (lambda factor: factor * 1.01, "layer 1, out_proj or o_proj (at 1.mixed)"),
    ("NormQMatMul", 1, "epsilon"): (lambda epsilon: epsilon + 0.1, "layer 1, in_proj (at 1.gate)"),
    ("NormQMatMul", 2, "epsilon"): (lambda epsilon: epsilon + 0.1, f"layer 1, {MLP} (at 1.output)"),
    ("SiluQMatMul", 1, "gate_offset"): (lambda offset: offset - 1, f"layer 1, {MLP} (at 1.output)"),
}


@pytest.fixture(scope="module")
def int4_reference(make_checkpoint: MakeCheckpoint, build: Build) -> Reference:
    """PyTorch on what the plain int4 artifact stores."""
    reference = Reference(make_checkpoint())
    reference.hold(load_runner(build(make_checkpoint(), "int4")).stored_weights())
    return reference


@pytest.mark.parametrize("place", NATIVE, ids=str)
def test_a_fault_in_our_own_kernels_is_named(
    place: tuple[str, int, str],
    int4_reference: Reference,
    make_checkpoint: MakeCheckpoint,
    build: Build,
    tmp_path: Path,
) -> None:
    (op, index, name) = place
    (change, said) = NATIVE[place]

    def wrong(model: onnx.ModelProto) -> None:
        node = [node for node in model.graph.node if node.op_type == op][index]
        (attribute,) = [attribute for attribute in node.attribute if attribute.name == name]
        value = onnx.helper.get_attribute_value(attribute)
        attribute.CopyFrom(onnx.helper.make_attribute(name, type(value)(change(value))))

    artifact = edited_graph(build(make_checkpoint(), "int4"), tmp_path, wrong, "model.native.onnx")

    def rows(kernels: Kernels) -> tuple[Row, ...]:
        runner = load_runner(artifact, float32=True, kernels=kernels)
        return tuple(bisect(runner, int4_reference, Comparison.STORED, tolerance=tolerances.EXACT["states"], seed=0))

    assert named(Report({}, {}, rows("native"))) == said
    assert Report({}, {}, rows("stock")).passed  # its own graph is right


def test_a_graph_without_names_is_not_bisected(make_checkpoint: MakeCheckpoint, build: Build, tmp_path: Path) -> None:
    def unnamed(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [name.replace("probe.", "value.") for name in names]
        del model.graph.value_info[:]

    artifact = edited_graph(build(make_checkpoint(), "int4"), tmp_path, unnamed, "model.native.onnx")
    runner = load_runner(artifact, kernels="native")
    with pytest.raises(H1ExportError, match="names no values between its ops; build the artifact again"):
        runner.observe(np.ones((1, 3), np.int64), np.ones((1, 3), np.int64), runner.initial(1))


def exponents(rows: Any) -> Any:
    rows[..., 65] += rows[..., 65] != 0
    return rows


def shifted_block(rows: Any) -> Any:
    rows[..., :64] = np.roll(rows[..., :64], 32, axis=-1)
    return rows


def stale_rows(rows: Any) -> Any:
    rows[:, :, 1:] = rows[:, :, :-1].copy()
    return rows


@pytest.mark.parametrize(
    ("kind", "fault", "level"),
    [("key", exponents, 0), ("value", exponents, 4), ("value", shifted_block, 0), ("key", stale_rows, 4)],
)
def test_a_fault_of_rows_in_int8_fails(
    kind: str, fault: Callable[[Any], Any], level: int, make_checkpoint: MakeCheckpoint, build: Build
) -> None:
    """Of one layer, in the rows that a call adds; the judge of the lowering reads float32, and must not see it."""
    truth = make_checkpoint(head_dim=64)
    artifact = build(truth, "int4", kv="int8", accuracy_level=level)
    name = f"past_key_values.1.{kind}"

    def change(states: Any, new: Any) -> Any:
        past = states[name].shape[2]
        return {**new, name: np.concatenate([new[name][:, :, :past], fault(new[name][:, :, past:].copy())], axis=2)}

    exact = load_runner(artifact, float32=True)
    options = ValidateOptions(pairs=0, quick=True)
    right, wrong = (
        validate(artifact, shipped, exact, checkpoint=truth, options=options, progress=SILENT)
        for shipped in (load_runner(artifact), with_changed_states(artifact, change))
    )
    assert right.passed, right.to_json()
    assert {row.comparison for row in failed(wrong)} - {Comparison.SOURCE} == {Comparison.DRIFT}


def with_changed_states(artifact: Artifact, change: Callable[[Any, Any], Any]) -> Any:
    """A Runner that hands on what ``change`` makes of the states before and after a call."""
    runner: Any = load_runner(artifact)
    step = runner.step
    observe = runner.observe

    def changed_step(ids: Any, mask: Any, states: Any) -> Any:
        logits, new = step(ids, mask, states)
        return logits, change(states, new)

    def changed_observe(ids: Any, mask: Any, states: Any) -> Any:
        logits, new, probes = observe(ids, mask, states)
        return logits, change(states, new), probes

    runner.step = changed_step
    runner.observe = changed_observe
    return runner


STALE = {
    "recurrent_state": "layer 1, recurrent_state as it is handed on (at 1.recurrent_state)",
    "conv_state": "layer 1, conv_state as it is handed on (at 1.conv_state)",
    "key": "layer 1, key cache (at 1.key added)",
    "value": "layer 1, value cache (at 1.value added)",
}


@pytest.mark.parametrize("kind", STALE)
def test_a_stale_state_fails(kind: str, make_checkpoint: MakeCheckpoint, build: Build) -> None:
    """One layer hands back the state it was given; the first call cannot show it, later ones must."""
    truth = make_checkpoint()
    name = f"past_key_values.1.{kind}"

    def stale(states: Any, new: Any) -> Any:
        old = states[name]
        if old.shape != new[name].shape:  # a cache must grow all the same
            old = np.concatenate([old, np.zeros_like(new[name][:, :, old.shape[2] :])], axis=2)
        return {**new, name: old}

    artifact = build(truth)
    report = judge(artifact, truth, with_changed_states(artifact, stale))
    rows = failed(report)
    assert "512 decode steps" in {row.case for row in rows}
    assert all(f"worst state 1.{kind}" in row.note for row in rows if row.case == "one token")
    assert named(report) == STALE[kind]


def test_a_cache_that_loses_its_oldest_token_fails(make_checkpoint: MakeCheckpoint, build: Build) -> None:
    truth = make_checkpoint()
    name = "past_key_values.1.key"

    def lose(states: Any, new: Any) -> Any:
        return (
            {**new, name: np.concatenate([np.zeros_like(new[name][:, :, :1]), new[name][:, :, 1:]], axis=2)}
            if states[name].size
            else new
        )

    artifact = build(truth)
    report = judge(artifact, truth, with_changed_states(artifact, lose))
    assert failed(report)
    assert named(report, Phase.DECODE) == "layer 1, key cache (at 1.key kept)"
    (prefill,) = [row for row in report.rows if row.kind is CheckKind.BISECT and row.phase is Phase.PREFILL]
    assert prefill.verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("quant", "bits", "method"), [("int4", 4, "rtn"), ("int8", 8, "rtn"), ("int4", 4, "awq"), ("int4", 4, "gptq")]
)
def test_one_wrong_block_fails(
    quant: str, bits: int, method: str, spoken_checkpoint: Path, build: Build, tmp_path: Path
) -> None:
    """32 wrong codes, which a comparison with the stored weights does not see: the integers are checked too."""
    truth = spoken_checkpoint
    artifact = build(truth, quant, method=method)
    assert judge(artifact, truth, quick=True).passed
    copy = Path(shutil.copytree(artifact.folder, tmp_path / "copy"))
    name = "model.layers.1.mamba.out_proj.weight|model.layers.1.self_attn.o_proj.weight.codes"
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    offset += artifact.config.mamba_d_ssm * bits // 8  # o_proj's first column
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[offset : offset + 16] = bytes(byte ^ 0x88 for byte in data[offset : offset + 16])
    (copy / "model.onnx.data").write_bytes(bytes(data))
    report = judge(Artifact.open(copy), truth, quick=True)
    rows = failed(report)
    assert [row.kind for row in rows if "group" in row.figures] == [CheckKind.STORED_INTEGERS]
    assert rows[0].note.endswith("model.layers.1.self_attn.o_proj.weight")
    (integers,) = [row for row in report.rows if row.kind is CheckKind.BISECT_INTEGERS]
    assert integers.note.startswith("beyond rounding: layer 1, o_proj")


def test_answers_that_are_not_numbers_fail(make_checkpoint: MakeCheckpoint, build: Build) -> None:
    truth = make_checkpoint()
    artifact = build(truth)
    runner: Any = load_runner(artifact)
    step = runner.step

    def broken(ids: Any, mask: Any, states: Any) -> Any:
        logits, new = step(ids, mask, states)
        logits[..., -1, 3] = np.nan
        return logits, new

    runner.step = broken
    assert len(failed(judge(artifact, truth, runner))) == 8
