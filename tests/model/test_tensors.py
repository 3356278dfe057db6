"""The layout: the tensors that transformers makes for a config, no more and no fewer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import FalconH1Config as TransformersConfig
from transformers import FalconH1ForCausalLM

from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import tensor_shapes


def test_the_layout_is_transformers_state_dict(checkpoint: Path) -> None:
    config = TransformersConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        model = FalconH1ForCausalLM(config)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        assert theirs.pop("lm_head.weight") == theirs["model.embed_tokens.weight"]
    assert dict(tensor_shapes(FalconH1Config.load(checkpoint))) == theirs


@pytest.mark.parametrize(
    ("switch", "names"),
    [
        ("attention_bias", {f"self_attn.{part}_proj.bias" for part in "qkvo"}),
        ("mlp_bias", {f"feed_forward.{part}_proj.bias" for part in ("gate", "up", "down")}),
        ("projectors_bias", {"mamba.out_proj.bias"}),
        ("mamba_proj_bias", {"mamba.in_proj.bias"}),
        ("mamba_conv_bias", {"mamba.conv1d.bias"}),
        ("mamba_rms_norm", {"mamba.norm.weight"}),
    ],
)
def test_a_switch_brings_its_own_tensors_and_no_others(
    switch: str, names: set[str], config_of: Callable[..., FalconH1Config]
) -> None:
    on, off = (tensor_shapes(config_of(num_hidden_layers=2, **{switch: value})) for value in (True, False))
    assert on.keys() - off.keys() == {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in names}
    assert off.keys() <= on.keys()


def test_a_tied_head_has_no_tensor(config_of: Callable[..., FalconH1Config]) -> None:
    untied, tied = (tensor_shapes(config_of(tie_word_embeddings=value)) for value in (False, True))
    assert untied.keys() - tied.keys() == {"lm_head.weight"}
    assert untied["lm_head.weight"] == untied["model.embed_tokens.weight"] == (32784, 1024)
