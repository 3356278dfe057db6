"""Activation-aware scaling: it leaves the model as it is, and products with less error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array
from h1export.model.falcon_h1.tensors import EMBEDDING
from h1export.progress import SILENT
from h1export.quantize.awq_scales import SCALING, AwqScales, ScaledStore
from h1export.quantize.layers import LoadedLayer, embed
from h1export.quantize.methods.awq import search_scales, unit_scales
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.scheme import QuantScheme
from h1export.quantize.source import Rounded
from h1export.validate.accuracy.reference import Reference

SCHEME = QuantScheme("int4", 32, "awq")
Found = tuple[WeightStore, FalconH1Config, AwqScales]


def ids(config: FalconH1Config) -> Array:
    return np.random.default_rng(0).integers(0, config.vocab_size, (3, 60))


def found(checkpoint: Path, jobs: int = 1) -> Found:
    config = FalconH1Config.load(checkpoint)
    store = WeightStore.open(checkpoint, config)
    return (
        store,
        config,
        search_scales(store, config, SCHEME.precisions(config), ids=ids(config), jobs=jobs, progress=SILENT),
    )


def whole(store: WeightStore, name: str) -> Array:
    return store.rows(name, 0, store.shape(name)[0])


@pytest.fixture(scope="module", params=["plain", "tied", "everything", "norm_before_gate_three_groups"])
def scaled(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path]) -> tuple[Path, Found]:
    checkpoint = make_checkpoint(request.param)
    return checkpoint, found(checkpoint)


def test_the_model_does_not_change(scaled: tuple[Path, Found]) -> None:
    """Logits and states of transformers' model, but for rounding; and it does where any tensor is left as it was."""
    checkpoint, (store, config, factors) = scaled
    reference = Reference(checkpoint)
    row = ids(config)[0]
    after = ScaledStore(store, factors, SILENT)
    truth, states = reference.full(row)
    reference.hold({name: whole(after, name) for name in factors.tensors})
    logits, moved = reference.full(row)
    span = float(np.ptp(truth))
    np.testing.assert_allclose(logits, truth, atol=3e-6 * span)
    for name, state in states.items():
        np.testing.assert_allclose(moved[name], state, atol=3e-6 * float(np.ptp(state)))
    moving = [name for name, values in sorted(factors.rows.items()) if (values != 1).any()]  # the guard drops some
    assert len(moving) > 2
    for name in moving[:4]:
        reference.hold({name: whole(store, name)})
        assert np.abs(reference.full(row)[0] - truth).max() > 1e-4 * span, name
        reference.hold({name: whole(after, name)})


def test_what_is_left_alone(scaled: tuple[Path, Found]) -> None:
    """Embeddings, and values, which are a state."""
    _, (_, _, factors) = scaled
    assert not any(name == EMBEDDING or "o_proj" in name for name in factors.tensors)
    assert not any("v_proj" in name or "k_proj" in name for name in factors.rows)
    assert all((values > 0).all() for values in factors.rows.values())


@pytest.mark.parametrize("tensor", ["mamba.in_proj", "self_attn.k_proj"])
def test_products_have_less_error(tensor: str, make_checkpoint: Callable[..., Path]) -> None:
    """Of inputs whose channels a norm makes very unequal, on another text than the one that was looked at."""
    checkpoint = make_checkpoint("plain")
    config = FalconH1Config.load(checkpoint)
    name = f"model.layers.0.{tensor}.weight"
    sizes = np.exp2(np.random.default_rng(2).integers(-3, 4, config.hidden_size)).astype(np.float32)
    store = ScaledStore(
        WeightStore.open(checkpoint, config), AwqScales({}, {"model.layers.0.input_layernorm.weight": sizes}), SILENT
    )
    precisions = {name: SCHEME.precisions(config)[name]}
    factors = search_scales(store, config, precisions, ids=ids(config), jobs=1, progress=SILENT)
    other = np.random.default_rng(1).integers(0, config.vocab_size, 100)
    inputs = (
        LoadedLayer(config, 0, read=lambda tensor: whole(store, tensor))
        .run(embed(store, config, other))[1]["mamba.in_proj"]
        .numpy()
    )
    errors = []
    for chosen in (AwqScales({}, {}), factors):
        rounded = (
            Rounded(ScaledStore(store, chosen, SILENT), precisions, quantize_rows)
            .rows(name, 0, store.shape(name)[0])
            .unfolded()
        )
        errors.append(np.square(inputs @ (chosen.undone(name, rounded) - whole(store, name)).T).sum())
    assert errors[1] < 0.8 * errors[0]


def test_threads_change_no_digit(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = make_checkpoint("everything")
    one, other = (found(checkpoint, jobs)[2] for jobs in (1, 3))
    assert one.tensors == other.tensors
    assert all(np.array_equal(one.columns[name], other.columns[name]) for name in one.columns)


def test_a_plan_has_the_same_shapes(scaled: tuple[Path, Found]) -> None:
    _, (store, config, factors) = scaled
    ones = unit_scales(store, config, SCHEME.precisions(config))
    for ours, planned in ((factors.columns, ones.columns), (factors.rows, ones.rows)):
        assert {name: values.shape for name, values in ours.items()} == {
            name: values.shape for name, values in planned.items()
        }


def test_undone_is_the_inverse(scaled: tuple[Path, Found]) -> None:
    _, (store, _, factors) = scaled
    after = ScaledStore(store, factors, SILENT)
    for name in factors.tensors:
        if len(store.shape(name)) == 2:
            np.testing.assert_allclose(factors.undone(name, whole(after, name)), whole(store, name), rtol=1e-6)
            np.testing.assert_array_equal(after.rows(name, 3, 9), whole(after, name)[3:9])


def test_it_is_read_back(scaled: tuple[Path, Found], tmp_path: Path) -> None:
    factors = scaled[1][2]
    assert AwqScales.load(tmp_path).tensors == frozenset()
    factors.save(tmp_path)
    read = AwqScales.load(tmp_path)
    assert read.tensors == factors.tensors
    for name in factors.columns:
        np.testing.assert_array_equal(read.columns[name], factors.columns[name])
    (tmp_path / SCALING).write_bytes(b"nothing")
    with pytest.raises(H1ExportError, match=f"{SCALING}: cannot be read .*; build the artifact again"):
        AwqScales.load(tmp_path)
