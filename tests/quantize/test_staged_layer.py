"""A layer in stages: what the whole layer computes, and new weights from a stop on."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from h1export.checkpoint.store import WeightStore
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.projections import INPUT_GROUPS
from h1export.model.falcon_h1.states import Array
from h1export.quantize.device import CPU_DEVICE, ComputeDevice
from h1export.quantize.layers import LoadedLayer
from h1export.quantize.methods.moments import ROW_BLOCKS, Moments, weighted
from h1export.quantize.methods.staged_layer import STOPS, StagedLayer, Stopped

HALF = 2.0**-7  # bf16 has eight bits


def run(staged: StagedLayer, hidden: Array) -> tuple[Array, dict[str, torch.Tensor]]:
    at: Stopped = staged.start(torch.from_numpy(hidden))
    inputs: dict[str, torch.Tensor] = {}
    for stop, groups in enumerate(STOPS):
        assert set(at.inputs) == set(groups)
        inputs |= {group: at.flat(group) for group in groups}
        staged.put(stop)
        at = staged.run(stop, at)
    assert not at.inputs
    return at.residual.reshape(hidden.shape).numpy(), inputs


@pytest.mark.parametrize("name", ["everything", "norm_after_gate_two_groups"])
@pytest.mark.parametrize("shape", [(40,), (2, 40)])
def test_it_computes_what_the_whole_layer_does(
    name: str, shape: tuple[int, ...], make_checkpoint: Callable[..., Path]
) -> None:
    checkpoint = make_checkpoint(name)
    config = FalconH1Config.load(checkpoint)
    store = WeightStore.open(checkpoint, config)

    def read(tensor: str) -> Array:
        return store.rows(tensor, 0, store.shape(tensor)[0])

    hidden = np.random.default_rng(0).standard_normal((*shape, config.hidden_size)).astype(np.float32)
    right, inputs = LoadedLayer(config, 1, read=read).run(hidden)
    output, found = run(StagedLayer(config, 1, read=read), hidden)
    assert set(found) == set(INPUT_GROUPS)
    np.testing.assert_allclose(output, right, atol=1e-5 * np.abs(right).max())
    for group, value in found.items():
        torch.testing.assert_close(value, inputs[group], rtol=1e-5, atol=1e-5)
    halves: ComputeDevice = replace(CPU_DEVICE, halves=True)
    rounded, of_halves = run(StagedLayer(config, 1, read=read, device=halves), hidden)
    assert 0 < np.abs(rounded - right).max() < 4 * HALF * np.abs(right).max()
    assert all(value.dtype == torch.float32 for value in of_halves.values())


@pytest.mark.parametrize("kind", [StagedLayer, LoadedLayer])
def test_a_layer_goes_with_its_last_name(kind: Any, make_checkpoint: Callable[..., Path]) -> None:
    """Weights of a layer that nobody uses are free at once, and not when Python next looks for cycles."""
    checkpoint = make_checkpoint()
    config = FalconH1Config.load(checkpoint)
    store = WeightStore.open(checkpoint, config)
    hidden = np.zeros((8, config.hidden_size), np.float32)
    layer = kind(config, 0, read=lambda tensor: store.rows(tensor, 0, store.shape(tensor)[0]))
    run(layer, hidden) if kind is StagedLayer else layer.run(hidden)
    gone = weakref.ref(layer)
    gc.disable()
    try:
        del layer
        assert gone() is None
    finally:
        gc.enable()


def test_weights_that_are_put_later_change_what_comes_later(make_checkpoint: Callable[..., Path]) -> None:
    """Inputs before a stop are those of the first weights; what comes after it is zero where its weights are."""
    checkpoint = make_checkpoint()
    config = FalconH1Config.load(checkpoint)
    store = WeightStore.open(checkpoint, config)
    zero = False

    def read(tensor: str) -> Array:
        values = store.rows(tensor, 0, store.shape(tensor)[0])
        return values * 0 if zero else values

    hidden = torch.from_numpy(np.random.default_rng(0).standard_normal((30, config.hidden_size)).astype(np.float32))
    staged = StagedLayer(config, 0, read=read)
    at = staged.start(hidden)
    staged.put(0)
    at = staged.run(0, at)
    assert all(bool(value.abs().sum() > 0) for value in at.inputs.values())
    zero = True
    staged.put(1)
    after = staged.run(1, at)
    torch.testing.assert_close(after.residual, at.residual)


@pytest.mark.parametrize("columns", [1, ROW_BLOCKS - 1, 64, 70])
@pytest.mark.parametrize("lengths", [(5,), (1000, 1500, 3)])
def test_moments_are_sums_over_positions(columns: int, lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(length, columns, generator=generator), torch.randn(length, columns, generator=generator))
        for length in lengths
    ]
    t, x = (torch.cat(side).double() for side in zip(*pairs, strict=True))
    found = Moments.of(pairs)
    torch.testing.assert_close(found.own, x.T @ x, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.drift, (t - x).T @ x, rtol=1e-4, atol=1e-3)
    assert torch.equal(found.own, found.own.T)
    again = Moments.of(pairs, 3)
    assert torch.equal(found.own, again.own)
    assert torch.equal(found.drift, again.drift)
    weights = torch.rand(lengths[0], generator=generator)
    (only,) = (weighted(pairs[0], weights),)
    of_first = Moments.of([only])
    t, x = (side.double() for side in pairs[0])
    torch.testing.assert_close(of_first.own, x.T @ (weights.double()[:, None] * x), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(of_first.drift, (t - x).T @ (weights.double()[:, None] * x), rtol=1e-4, atol=1e-3)


def test_halves_round_the_drift_and_nothing_that_is_inverted() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(600, 64, generator=generator), torch.randn(600, 64, generator=generator))]
    exact, halves = (Moments.of(pairs, device=replace(CPU_DEVICE, halves=flag)) for flag in (False, True))
    assert torch.equal(exact.own, halves.own)
    error = (halves.drift - exact.drift).abs().max()
    assert 0 < error < HALF * exact.drift.abs().max()
