"""Steps after a method: they lower the divergence, on any number of threads and after any kill, or are dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from h1export.artifact.stage import Stage
from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import EMBEDDING
from h1export.plugins import gradients
from h1export.progress import SILENT
from h1export.quantize.choices import Step, parse_method
from h1export.quantize.layers import LoadedLayer
from h1export.quantize.methods import tune, tuned_values
from h1export.quantize.methods.guard import Errors
from h1export.quantize.methods.scale_search import plain_rows
from h1export.quantize.methods.tune import tune_model
from h1export.quantize.scheme import QuantScheme
from h1export.quantize.source import QuantizedWeights, Rounded

UPDATES = 6


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("rtn", ("rtn", ())),
        ("gptq+round+scales", ("gptq", ("round", "scales"))),
        ("search+scales", ("search", ("scales",))),
        ("awq+scales+round", ("awq", ("scales", "round"))),
    ],
)
def test_what_a_method_is_made_of(words: str, found: tuple[str, tuple[str, ...]]) -> None:
    assert parse_method(words) == found
    scheme = QuantScheme("int4", 32, words)
    assert (scheme.base, scheme.steps) == found
    assert scheme.calibrated == (words != "rtn")


@pytest.mark.parametrize(
    "words",
    ["+", "+scales", "gptq+", "gptq+scales+scales", "gptq+gptq", "scales", "gptq+ scales", "gptq,scales", "GPTQ"],
)
def test_nonsense_is_refused(words: str) -> None:
    with pytest.raises(H1ExportError, match="--method"):
        QuantScheme("int4", 32, words)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned_values, "WARMUP", 2)
    monkeypatch.setattr(tune, "SAVED_EVERY", 3)
    for step, rate in (("round", 0.05), ("scales", 0.005)):
        monkeypatch.setitem(tuned_values.STEPS, step, UPDATES)  # type: ignore[arg-type]
        monkeypatch.setitem(tuned_values.RATES, step, rate)  # type: ignore[arg-type]


def tuned(
    checkpoint: Path, folder: Path, *steps: Step, jobs: int = 1
) -> tuple[Rounded, QuantizedWeights, dict[Step, Errors]]:
    """Of plain integers, on random tokens; the sequence that is held out is one of those that are tuned on."""
    config = FalconH1Config.load(checkpoint)
    store = WeightStore.open(checkpoint, config)
    before = Rounded(store, QuantScheme("int4", 32).precisions(config), plain_rows)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40))[[0, 1, 0, 1, 0]]
    folder.mkdir(exist_ok=True)
    found = tune_model(store, config, before, steps=steps, ids=ids, stage=Stage(folder, jobs), progress=SILENT)
    return before, *found


def integers(found: QuantizedWeights, store: WeightStore) -> dict[str, tuple[bytes, bytes]]:
    whole = {name: found.rows(name, 0, store.shape(name)[0]) for name in found.precisions}
    return {name: (one.codes.tobytes(), one.scales.tobytes()) for name, one in whole.items()}


@pytest.mark.parametrize("name", ["plain", "tied"])
@pytest.mark.usefixtures("few")
def test_steps_lower_the_divergence(name: str, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Scales move scales alone, and round moves codes alone; an embedding moves where it is the head too."""
    before, after, found = tuned(make_checkpoint(name), tmp_path / "stage", "scales")
    assert found["scales"][0] < found["scales"][1]
    first, then = (integers(one, before.store) for one in (before, after))
    assert all(first[tensor][0] == then[tensor][0] for tensor in first)
    still = {tensor for tensor in first if first[tensor] == then[tensor]}
    assert still == (set() if name == "tied" else {EMBEDDING})


@pytest.mark.usefixtures("few")
def test_round_moves_codes_by_one_at_most(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    before, after, found = tuned(make_checkpoint("plain"), tmp_path / "stage", "round")
    assert found["round"][0] < found["round"][1]
    moved = 0
    for name, precision in after.precisions.items():
        one, other = (source.rows(name, 0, before.store.shape(name)[0]) for source in (before, after))
        assert np.array_equal(one.scales, other.scales)
        change = np.abs(one.codes.astype(int) - other.codes)
        assert np.abs(other.codes.astype(int)).max() <= precision.top
        assert change.max() <= 1
        moved += int(change.sum())
    assert moved > 0


@pytest.mark.usefixtures("few")
def test_a_step_that_is_worse_is_dropped(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tuned_values.RATES, "scales", 3.0)  # type: ignore[arg-type]
    before, after, found = tuned(make_checkpoint("plain"), tmp_path / "stage", "scales")
    assert not found["scales"][0] <= found["scales"][1]
    assert integers(before, before.store) == integers(after, before.store)


@pytest.mark.usefixtures("few")
def test_neither_threads_nor_kills_change_a_byte(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two updates of each step, and once more before the first."""
    checkpoint = make_checkpoint("plain")
    before, right, errors = tuned(checkpoint, tmp_path / "right", "scales", "round", jobs=3)
    update = tune._Tuner._update
    calls: list[int] = []

    def stopped(self: Any, number: int, weight: torch.Tensor) -> None:
        calls.append(number)
        if len(calls) in (1, 6, 14):
            raise KeyboardInterrupt
        update(self, number, weight)

    monkeypatch.setattr(tune._Tuner, "_update", stopped)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            tuned(checkpoint, tmp_path / "stage", "scales", "round")
    _, after, again = tuned(checkpoint, tmp_path / "stage", "scales", "round")
    assert len(calls) < 2 * 2 * UPDATES, "what was saved is not computed again"
    assert integers(after, before.store) == integers(right, before.store)
    assert {step: found.tolist() for step, found in again.items()} == {k: v.tolist() for k, v in errors.items()}


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_a_layers_gradients_are_its_differences(name: str, make_checkpoint: Callable[..., Path]) -> None:
    """By its input, and by one weight of each projection, along random directions."""
    gradients.register()
    checkpoint = make_checkpoint(name)
    config = FalconH1Config.load(checkpoint)
    store = WeightStore.open(checkpoint, config)
    rng = np.random.default_rng(0)
    hidden, outer, direction = rng.standard_normal((3, 20, config.hidden_size)).astype(np.float32)
    moved: dict[str, np.ndarray] = {}  # type: ignore[type-arg]

    def read(tensor: str) -> np.ndarray:  # type: ignore[type-arg]
        return store.rows(tensor, 0, store.shape(tensor)[0]) + moved.get(tensor, np.float32(0))

    def value(x: np.ndarray) -> float:  # type: ignore[type-arg]
        return float((LoadedLayer(config, 1, read=read).output(x).astype(np.float64) * outer).sum())

    names = ["mamba.in_proj.weight", "self_attn.k_proj.weight", "feed_forward.down_proj.weight"]
    of_input, of_weights = LoadedLayer(config, 1, read=read).gradients(hidden, outer, names)
    step = 1e-2
    wanted = (value(hidden + step * direction) - value(hidden - step * direction)) / (2 * step)
    assert float((of_input * direction).sum()) == pytest.approx(wanted, rel=0.02, abs=1e-3 * float(np.abs(outer).sum()))
    for short, gradient in zip(names, of_weights, strict=True):
        tensor = f"model.layers.1.{short}"
        size = float(np.abs(store.rows(tensor, 0, store.shape(tensor)[0])).mean())
        along = rng.standard_normal(gradient.shape).astype(np.float32)
        differences = []
        for sign in (1, -1):
            moved[tensor] = sign * 0.02 * size * along
            differences.append(value(hidden))
        del moved[tensor]
        wanted = (differences[0] - differences[1]) / (0.04 * size)
        found = float((gradient.numpy() * along).sum())
        assert found == pytest.approx(wanted, rel=0.05, abs=0.02 * float(gradient.norm())), short
