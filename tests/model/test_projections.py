"""The table of projections against the modules of both models.

Tests/graphs/test_projections.py has its µP multipliers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import FalconH1Config as TransformersConfig
from transformers import FalconH1ForCausalLM

from h1export.graphs.model import FalconH1
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.probes import ProbePoint
from h1export.model.falcon_h1.projections import (
    HEAD,
    INPUT_GROUPS,
    LAYER_PROJECTIONS,
    POINTS_READ,
    PROJECTIONS,
    SUSPECT_MLP,
    SUSPECT_OPS,
    ModelPart,
)
from h1export.model.falcon_h1.tensors import layer_prefix, projection_of, split_layer, tensor_shapes

PARTS = {"mamba": ModelPart.MAMBA, "self_attn": ModelPart.ATTENTION, "feed_forward": ModelPart.MLP}


def matrices(model: nn.Module) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Every linear and embedding of a model by path: its shape, and whether it has a bias."""
    return {
        name: (tuple(module.weight.shape), getattr(module, "bias", None) is not None)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    }


def table(config: FalconH1Config) -> dict[str, tuple[tuple[int, ...], bool]]:
    """What the table says they are."""
    found = {
        projection.name: (projection.shape(config), projection.has_bias(config))
        for projection in PROJECTIONS
        if not projection.per_layer
    }
    for layer in range(config.num_hidden_layers):
        for projection in LAYER_PROJECTIONS:
            found[layer_prefix(layer) + projection.name] = (projection.shape(config), projection.has_bias(config))
    return found


def test_every_matrix_of_both_models_is_a_row(checkpoint: Path) -> None:
    config = FalconH1Config.load(checkpoint)
    with torch.device("meta"):
        ours = FalconH1(config)
        theirs = FalconH1ForCausalLM(TransformersConfig.from_pretrained(checkpoint))
    assert matrices(ours) == table(config)
    assert matrices(theirs) == table(config)


def test_the_layout_has_the_matrices_of_the_table_and_no_others(checkpoint: Path) -> None:
    config = FalconH1Config.load(checkpoint)
    shapes = tensor_shapes(config)
    expected = {f"{name}.weight": shape for name, (shape, _) in table(config).items()}
    expected |= {f"{name}.bias": shape[:1] for name, (shape, bias) in table(config).items() if bias}
    if config.tie_word_embeddings:
        del expected[HEAD.weight]
    found = {name: shape for name, shape in shapes.items() if name in expected}
    assert found == expected
    assert {name for name in shapes if projection_of(name)} == {name for name in expected if name.endswith("weight")}
    assert {name for name, shape in shapes.items() if len(shape) == 2} == {
        name for name in shapes if projection_of(name)
    }


def test_projections_of_a_group_read_one_input(config_of: Callable[..., FalconH1Config]) -> None:
    config = config_of()
    ops = {name: [projection.op for projection in group] for name, group in INPUT_GROUPS.items()}
    assert ops == {
        "mamba.in_proj": ["in_proj", "q_proj", "k_proj", "v_proj"],
        "mamba.out_proj": ["out_proj"],
        "self_attn.o_proj": ["o_proj"],
        "feed_forward.gate_proj": ["gate_proj", "up_proj"],
        "feed_forward.down_proj": ["down_proj"],
    }
    for group in INPUT_GROUPS.values():
        assert len({projection.columns(config) for projection in group}) == 1


def test_what_produces_an_input_has_a_row_for_each_of_its_columns(config_of: Callable[..., FalconH1Config]) -> None:
    config = config_of(mamba_rms_norm=True, mlp_bias=True, tie_word_embeddings=False)
    shapes = tensor_shapes(config)
    for projection in PROJECTIONS:
        for tensor in projection.input.produced_by:
            name = layer_prefix(0) + tensor if projection.per_layer else tensor
            assert shapes[name][0] == projection.columns(config), projection.name


def test_parts_follow_the_modules() -> None:
    for projection in LAYER_PROJECTIONS:
        assert projection.part is PARTS[projection.name.split(".")[0]]
    assert [projection.part for projection in PROJECTIONS[:2]] == ["embedding", "head"]


def test_every_point_is_read_or_written_somewhere() -> None:
    assert POINTS_READ == {
        "input_layernorm": ProbePoint.RESIDUAL,
        "pre_ff_layernorm": ProbePoint.MIXED,
        "mamba.out_proj": ProbePoint.GATED,
        "self_attn.o_proj": ProbePoint.ATTENDED,
        "feed_forward.down_proj": ProbePoint.PRODUCT,
    }
    assert SUSPECT_OPS == {
        ProbePoint.RESIDUAL: "down_proj",
        ProbePoint.GATE: "in_proj",
        ProbePoint.CONV_INPUT: "in_proj",
        ProbePoint.DT: "in_proj",
        ProbePoint.QUERY: "q_proj",
        ProbePoint.KEY: "k_proj",
        ProbePoint.VALUE: "v_proj",
        ProbePoint.CONV: "convolution",
        ProbePoint.GATED: "scan or its gate",
        ProbePoint.ATTENDED: "attention",
        ProbePoint.MIXED: "out_proj or o_proj",
        ProbePoint.PRODUCT: "gate_proj or up_proj",
    }
    assert SUSPECT_MLP == "gate_proj, up_proj or down_proj"


@pytest.mark.parametrize(
    ("tensor", "layer", "name", "op"),
    [
        ("model.layers.0.mamba.in_proj.weight", 0, "mamba.in_proj.weight", "in_proj"),
        ("model.layers.17.self_attn.o_proj.weight", 17, "self_attn.o_proj.weight", "o_proj"),
        ("model.layers.3.self_attn.o_proj.bias", 3, "self_attn.o_proj.bias", None),
        ("model.layers.3.mamba.conv1d.weight", 3, "mamba.conv1d.weight", None),
        ("model.embed_tokens.weight", None, "model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", None, "lm_head.weight", "lm_head"),
        ("model.final_layernorm.weight", None, "model.final_layernorm.weight", None),
        ("mamba.in_proj.weight", None, "mamba.in_proj.weight", None),
        ("model.layers.x.mamba.in_proj.weight", None, "model.layers.x.mamba.in_proj.weight", None),
        ("model.layers.0.lm_head.weight", 0, "lm_head.weight", None),
        ("", None, "", None),
    ],
)
def test_the_row_of_a_tensor(tensor: str, layer: int | None, name: str, op: str | None) -> None:
    assert split_layer(tensor) == (layer, name)
    projection = projection_of(tensor)
    assert (projection.op if projection else None) == op
