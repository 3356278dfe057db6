"""The model a layer at a time is the model: against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from h1export.checkpoint.store import WeightStore
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.projections import INPUT_GROUPS
from h1export.quantize.layers import LoadedLayer, embed, head_tensor, logits, weights_by_input
from h1export.validate.accuracy.logits import relative_error
from h1export.validate.accuracy.reference import Reference


def whole(store: WeightStore) -> Callable[[str], np.ndarray]:  # type: ignore[type-arg]
    return lambda name: store.rows(name, 0, store.shape(name)[0])


def test_logits_are_those_of_transformers(checkpoint: Path) -> None:
    config = FalconH1Config.load(checkpoint)
    store = WeightStore.open(checkpoint, config)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 40)
    hidden = embed(store, config, ids)
    for layer in range(config.num_hidden_layers):
        hidden = LoadedLayer(config, layer, read=whole(store)).output(hidden)
    found = logits(store, config, hidden, head=torch.from_numpy(whole(store)(head_tensor(config)))).numpy()
    assert relative_error(found, Reference(checkpoint).full(ids)[0]) < 1e-5


def test_the_inputs_are_those_of_the_products(make_checkpoint: Callable[..., Path]) -> None:
    """Seen by hooks on transformers' own layer; µP's factor on an input is the model's, and changes no integer."""
    from transformers import FalconH1ForCausalLM

    folder = make_checkpoint("everything")
    config = FalconH1Config.load(folder)
    store = WeightStore.open(folder, config)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 40)
    found = LoadedLayer(config, 0, read=whole(store)).run(embed(store, config, ids))[1]
    model = FalconH1ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs: dict[str, torch.Tensor] = {}
    for group in INPUT_GROUPS.values():
        for name in (projection.name for projection in group):
            module = model.model.layers[0].get_submodule(name)
            module.register_forward_pre_hook(lambda _, args, name=name: theirs.update({name: args[0][0]}))
    with torch.no_grad():
        model(torch.from_numpy(ids)[None])
    assert found.keys() == INPUT_GROUPS.keys()
    for group in INPUT_GROUPS.values():
        for name in (projection.name for projection in group):
            ours = found[group[0].name].flatten()
            other = theirs[name].flatten()
            factor = (ours @ other) / (ours @ ours)
            torch.testing.assert_close(ours * factor, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_every_projection_of_a_layer_has_an_input(make_checkpoint: Callable[..., Path]) -> None:
    config = FalconH1Config.load(make_checkpoint())
    store = WeightStore.open(make_checkpoint(), config)
    matrices = {
        entry.name for entry in store.entries if entry.name.startswith("model.layers.1.") and len(entry.shape) == 2
    }
    assert {tensor for group in weights_by_input(1).values() for tensor in group} == matrices
