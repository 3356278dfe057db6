"""Trace the model once, on the meta device, where weights take no memory.

Batch, sequence and past are dynamic, so that one graph serves prefill and decode.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.fx.experimental._config as fx_config
from torch.export import Dim
from torch.export.graph_signature import InputKind
from torch.fx import Graph

from h1export.checkpoint.weight_expr import Multiplier, WeightExpr
from h1export.graphs.model import FalconH1, LayerStates, layer_states
from h1export.graphs.program import Program
from h1export.graphs.unroll import TRACED, unroll
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.projections import IN_PROJ
from h1export.model.falcon_h1.states import ATTENTION_MASK, INPUT_IDS, LOGITS, StateSpec
from h1export.model.falcon_h1.tensors import EMBEDDING, LM_HEAD

# The sizes of the example are distinct, so that no two dims can be mistaken for one.
_BATCH = 3
_SEQ = 5
_PAST = 7


def trace(config: FalconH1Config, last_only: bool = False) -> Program:
    """Returns the model's Program, in which µP multipliers are still explicit.

    ``last_only`` computes the last position's logits only. A trace takes a few seconds and a few hundred MB for a model
    of any size: see ``unroll``.
    """
    if config.num_hidden_layers <= TRACED:
        return trace_all(config, last_only)
    return unroll(trace_all(replace(config, num_hidden_layers=TRACED), last_only), config)


def trace_all(config: FalconH1Config, last_only: bool = False) -> Program:
    """Returns the Program that ``trace`` returns, but torch.export traces every layer instead of two."""
    with torch.device("meta"):
        model = FalconH1(config, last_only).eval()
        ids = torch.ones(_BATCH, _SEQ, dtype=torch.int64)
        mask = torch.ones(_BATCH, _PAST + _SEQ, dtype=torch.int64)
        states = _example_states(config)
    batch = Dim("batch", min=1)
    seq = Dim("sequence", min=1)
    past = Dim("past", min=0)
    kv = {0: batch, 2: past}
    fixed = {0: batch}
    shapes = ({0: batch, 1: seq}, {0: batch, 1: Dim.DYNAMIC}, [(kv, kv, fixed, fixed)] * config.num_hidden_layers)
    # oblivious: sizes 0 and 1 are sizes like any other, so that past 0 and sequence 1 run in the same graph
    with torch.no_grad(), fx_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        exported = torch.export.export(model, (ids, mask, states), strict=False, dynamic_shapes=shapes)
    return _program(exported, config)


def _example_states(config: FalconH1Config) -> list[LayerStates]:
    return layer_states([torch.empty(tensor.sized(_BATCH, _PAST)) for tensor in StateSpec.of(config).tensors])


def _program(exported: torch.export.ExportedProgram, config: FalconH1Config) -> Program:
    states = StateSpec.of(config)
    names = iter([INPUT_IDS, ATTENTION_MASK, *(tensor.past for tensor in states.tensors)])
    weights = {}
    constants = {}
    inputs = {}
    mup = Multiplier(IN_PROJ.output_multiplier(config))
    for item in exported.graph_signature.input_specs:
        if item.kind is InputKind.PARAMETER:
            name = EMBEDDING if item.target == LM_HEAD and config.tie_word_embeddings else str(item.target)
            weights[item.arg.name] = WeightExpr.of(name)
        elif item.kind is InputKind.BUFFER:  # the only buffers of the model are the mup vectors of its mixers
            constants[item.arg.name] = mup
        else:
            inputs[item.arg.name] = next(names)
    _drop_other_names(exported.graph_module.graph, weights)
    outputs = (LOGITS, *(tensor.present for tensor in states.tensors))
    return Program(
        config, states, exported.graph_module, weights=weights, constants=constants, inputs=inputs, outputs=outputs
    )


def _drop_other_names(graph: Graph, weights: dict[str, WeightExpr]) -> None:
    """Drop the placeholders that torch.export keeps for the other names of a shared parameter, such as a tied head."""
    read = {weights[node.name] for node in graph.nodes if node.name in weights and node.users}
    for node in list(graph.nodes):
        if node.name in weights and not node.users and weights[node.name] in read:
            graph.erase_node(node)
            del weights[node.name]
