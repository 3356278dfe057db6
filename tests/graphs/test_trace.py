"""What the trace promises: one graph for every size, no weights, names and order of states."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from h1export.graphs.passes import run_passes
from h1export.graphs.program import Program
from h1export.graphs.trace import trace, trace_all
from h1export.graphs.verify import LEGAL_OPS
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateSpec
from h1export.model.falcon_h1.tensors import tensor_shapes
from h1export.plugins import h1

# the published 34B model, sizes as in its config.json
PUBLIC_34B: dict[str, Any] = {
    "model_type": "falcon_h1",
    "vocab_size": 261120,
    "hidden_size": 5120,
    "intermediate_size": 21504,
    "num_hidden_layers": 72,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "mamba_d_ssm": 4096,
    "mamba_n_heads": 32,
    "mamba_d_head": 128,
    "mamba_n_groups": 2,
    "mamba_d_state": 256,
    "mamba_chunk_size": 128,
    "mamba_rms_norm": True,
    "mamba_norm_before_gate": False,
    "max_position_embeddings": 262144,
    "rope_theta": 1e11,
    "embedding_multiplier": 5.65685,
    "lm_head_multiplier": 0.0078125,
    "attention_out_multiplier": 0.0375,
    "key_multiplier": 0.0110485,
    "ssm_in_multiplier": 0.25,
    "ssm_multipliers": [0.353553, 0.25, 0.176777, 0.5, 0.353553],
    "mlp_multipliers": [0.176777, 0.0111607],
}


def placeholders(program: Program) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if node.op == "placeholder"]


@pytest.mark.parametrize("sizes", [(1, 0, 1), (1, 0, 2), (1, 1, 1), (1, 17, 1), (2, 0, 1), (4, 3, 20), (3, 7, 5)])
@pytest.mark.parametrize("stage", ["unfolded", "passed"])
def test_one_graph_serves_every_batch_past_and_sequence(sizes: tuple[int, int, int], stage: str, full_lab: Any) -> None:
    """Batch, past and sequence of 0 and 1 too, which tracers like to take for constants."""
    batch, past, seq = sizes
    runner = full_lab.runner(getattr(full_lab, stage))
    states = {}
    for tensor in full_lab.passed.states.tensors:
        states[tensor.past] = torch.randn(
            [{"batch": batch, "past": past}.get(str(size), size) for size in tensor.shape]
        )
    ids = np.ones((batch, seq), np.int64)
    logits, states = runner.step(ids, np.ones((batch, past + seq), np.int64), states)
    assert logits.shape == (batch, seq, full_lab.config.vocab_size)
    expected = full_lab.passed.states.zeros(batch, past + seq)
    assert {key: state.shape for key, state in runner.snapshot(states).items()} == {
        key: state.shape for key, state in expected.items()
    }


def test_sizes_are_symbols_in_the_graph(full_lab: Any) -> None:
    """What a target declares as dynamic axes: batch, past and sequence; everything else is a number."""
    program = full_lab.passed
    results = dict(zip(program.outputs, program.graph.output_node().args[0], strict=True))
    tensors = {
        program.inputs[node.name]: node for node in placeholders(program) if node.name in program.inputs
    } | results
    for tensor in program.states.tensors:
        for name in (tensor.past, tensor.present):
            is_symbol = [isinstance(size, torch.SymInt) for size in tensors[name].meta["val"].shape]
            assert is_symbol == [isinstance(size, str) for size in tensor.shape], name
    assert [isinstance(size, torch.SymInt) for size in tensors["logits"].meta["val"].shape] == [True, True, False]


def lowest_sizes(program: Program) -> dict[tuple[str, int], int]:
    """(input, axis) -> the smallest size that the tracer believes possible."""
    sizes = {}
    for node in placeholders(program):
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt):
                sizes[program.inputs[node.name], axis] = int(size.node.shape_env.bound_sympy(size.node.expr).lower)
    return sizes


def test_no_size_is_assumed_to_be_larger_than_it_may_be(
    make_checkpoint: Callable[..., Path], lab_of: Callable[[Path], Any]
) -> None:
    """Tracers like to assume that a size is at least 2: batch and sequence may be 1, past 0, and so their sum 1.

    (With the gated norm PyTorch assumes a longer sequence for a memory format; the test above runs that graph with one
    token.)
    """
    sizes = lowest_sizes(lab_of(make_checkpoint("plain")).traced)
    assert sizes["input_ids", 0] <= 1
    assert sizes["input_ids", 1] <= 1
    assert sizes["attention_mask", 1] <= 1
    assert sizes["past_key_values.0.key", 2] == 0


def test_the_vocabulary_after_passes_is_legal_and_each_h1_op_appears_once_a_layer(lab: Any) -> None:
    called = [node.target for node in lab.passed.graph.nodes if node.op == "call_function"]
    assert set(called) <= LEGAL_OPS
    for op in (h1.ssm_scan.default, h1.causal_conv.default, h1.attention.default):
        assert called.count(op) == lab.config.num_hidden_layers


def test_no_weight_lives_inside_the_module(lab: Any) -> None:
    for program in (lab.traced, lab.passed):
        assert not list(program.module.parameters())
        assert not list(program.module.buffers())
        assert not program.module.state_dict()
        assert {node.op for node in program.graph.nodes} == {"placeholder", "call_function", "output"}


def test_every_placeholder_has_one_meaning(lab: Any) -> None:
    program = lab.traced
    names = [node.name for node in placeholders(program)]
    assert sorted([*program.weights, *program.constants, *program.inputs]) == sorted(names)
    assert {expr.only.tensor for expr in program.weights.values()} == set(tensor_shapes(lab.config))


def test_inputs_and_outputs_are_the_state_specs(lab: Any) -> None:
    states = StateSpec.of(lab.config)
    for program in (lab.traced, lab.passed):
        order = [program.inputs[node.name] for node in placeholders(program) if node.name in program.inputs]
        assert order == ["input_ids", "attention_mask", *(tensor.past for tensor in states.tensors)]
        assert program.outputs == ("logits", *(tensor.present for tensor in states.tensors))
        assert len(program.graph.output_node().args[0]) == len(program.outputs)


def test_a_swapped_state_output_would_be_seen(full_lab: Any, deviation: Callable[..., float]) -> None:
    """Names are positions in the output tuple: key and value look alike, and only numbers tell them apart."""
    program = full_lab.unfolded.editable()
    result = program.graph.output_node()
    logits, key, value, *rest = result.args[0]
    result.args = ((logits, value, key, *rest),)
    assert deviation(full_lab.run(program, [9]), full_lab.reference(full_lab.tokens[:9])) > 1e-3


def test_two_traces_are_the_same_graph(full_lab: Any) -> None:
    again = trace(full_lab.config)
    assert str(again.graph) == str(full_lab.traced.graph)
    assert (again.weights, again.constants, again.inputs) == (
        full_lab.traced.weights,
        full_lab.traced.constants,
        full_lab.traced.inputs,
    )
    assert str(run_passes(again).graph) == str(full_lab.passed.graph)


def test_last_only_gives_the_last_position(full_lab: Any) -> None:
    program = run_passes(trace(full_lab.config, last_only=True))
    logits, states = full_lab.run(program, [9])
    every, every_states = full_lab.run(full_lab.passed, [9])
    assert logits.shape == (1, full_lab.config.vocab_size)
    assert np.abs(logits - every[-1:]).max() < 1e-6 * np.ptp(every)
    assert all(np.array_equal(states[key], every_states[key]) for key in every_states)


def test_a_multiplier_of_one_leaves_no_node(make_checkpoint: Callable[..., Path]) -> None:
    program = trace(FalconH1Config.load(make_checkpoint("no_mup")))
    scalars = [
        node
        for node in program.calls(torch.ops.aten.mul.Tensor)
        if not all(isinstance(arg, torch.fx.Node) for arg in node.args)
    ]
    vectors = [node for node in placeholders(program) if node.name in program.constants and node.users]
    assert not scalars
    assert not vectors


def test_the_public_34b_shape_is_traced_on_the_meta_device() -> None:
    """Its weights would be 2 GB a layer and 11 GB of embedding and head: nothing of them may exist."""
    program = trace(FalconH1Config.from_config(PUBLIC_34B))
    values = [node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    weights = [node.meta["val"] for node in placeholders(program) if node.name in program.weights]
    assert {value.device.type for value in values} == {"meta"}
    assert 33e9 < sum(weight.numel() for weight in weights) < 35e9


def test_layers_are_all_alike() -> None:
    """What copies of a layer stand on: from scan to scan, the same ops."""
    layers = 5
    program = run_passes(trace_all(FalconH1Config.from_config({**PUBLIC_34B, "num_hidden_layers": layers})))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    scans = [index for index, target in enumerate(called) if target is h1.ssm_scan.default]
    assert len(scans) == layers
    between = [called[start:stop] for start, stop in pairwise(scans)]
    assert between == between[:1] * (layers - 1)
