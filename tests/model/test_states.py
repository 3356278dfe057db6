"""StateSpec: names, order, shapes and the zeros before the first token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import FalconH1Config as TransformersConfig
from transformers import FalconH1ForCausalLM

from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateKind, StateSpec


def test_names_in_graph_order(config_of: Callable[..., FalconH1Config]) -> None:
    kinds = ("key", "value", "conv_state", "recurrent_state")
    keys = [f"{layer}.{kind}" for layer in range(3) for kind in kinds]
    tensors = StateSpec.of(config_of(num_hidden_layers=3)).tensors
    assert [t.key for t in tensors] == keys
    assert [t.past for t in tensors] == [f"past_key_values.{key}" for key in keys]
    assert [t.present for t in tensors] == [f"present.{key}" for key in keys]
    names = [name for t in tensors for name in (t.past, t.present)]
    assert len(set(names)) == len(names)


def test_shapes_of_the_released_model(config_of: Callable[..., FalconH1Config]) -> None:
    tensors = StateSpec.of(config_of()).tensors
    assert len(tensors) == 36 * 4
    assert {t.kind: t.shape for t in tensors} == {
        StateKind.KEY: ("batch", 2, "past", 64),
        StateKind.VALUE: ("batch", 2, "past", 64),
        StateKind.CONV: ("batch", 1792, 3),
        StateKind.RECURRENT: ("batch", 24, 64, 128),
    }
    assert [t.layer for t in tensors] == [layer for layer in range(36) for _ in range(4)]


def test_keys_and_values_grow_and_the_others_do_not() -> None:
    assert [kind for kind in StateKind if kind.grows] == [StateKind.KEY, StateKind.VALUE]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("past", [0, 5])
def test_zeros(batch: int, past: int, config_of: Callable[..., FalconH1Config]) -> None:
    zeros = StateSpec.of(config_of(num_hidden_layers=2, mamba_n_groups=2, mamba_d_conv=2)).zeros(batch, past)
    assert {key: array.shape for key, array in zeros.items()} == {
        f"{layer}.{kind}": shape
        for layer in range(2)
        for kind, shape in {
            "key": (batch, 2, past, 64),
            "value": (batch, 2, past, 64),
            "conv_state": (batch, 2048, 1),
            "recurrent_state": (batch, 24, 64, 128),
        }.items()
    }
    assert all(array.dtype == np.float32 and not array.any() for array in zeros.values())


def test_zeros_are_not_shared(config_of: Callable[..., FalconH1Config]) -> None:
    states = StateSpec.of(config_of(num_hidden_layers=1))
    states.zeros(1, 2)["0.key"][:] = 1.0
    zeros = states.zeros(1, 2)
    zeros["0.key"][:] = 1.0
    assert not zeros["0.value"].any()
    assert not states.zeros(1, 2)["0.key"].any()


def test_without_a_past_no_key_is_there_yet(config_of: Callable[..., FalconH1Config]) -> None:
    assert StateSpec.of(config_of(num_hidden_layers=1)).zeros(2)["0.key"].shape == (2, 2, 0, 64)


def test_the_layouts_are_those_of_transformers_cache(checkpoint: Path) -> None:
    """After seven tokens. transformers keeps d_conv columns of the convolution.

    The first of them is never used again.
    """
    config = FalconH1Config.load(checkpoint)
    model = FalconH1ForCausalLM(TransformersConfig.from_pretrained(checkpoint)).eval()
    with torch.no_grad():
        cache = model(torch.arange(14).reshape(2, 7), use_cache=True).past_key_values
    zeros = StateSpec.of(config).zeros(2, 7)
    for layer, theirs in enumerate(cache.layers):
        assert tuple(theirs.keys.shape) == zeros[f"{layer}.key"].shape
        assert tuple(theirs.values.shape) == zeros[f"{layer}.value"].shape
        batch, channels, columns = theirs.conv_states[0].shape
        assert (batch, channels, columns - 1) == zeros[f"{layer}.conv_state"].shape
        assert tuple(theirs.recurrent_states[0].shape) == zeros[f"{layer}.recurrent_state"].shape
