"""The guard: solved integers are dropped where plain ones are better on sequences that no solver saw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from h1export.artifact.stage import Stage
from h1export.checkpoint.store import WeightStore
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import LM_HEAD
from h1export.progress import SILENT
from h1export.quantize.methods import awq, solved_file
from h1export.quantize.methods.gptq_model import solve_model
from h1export.quantize.methods.guard import GuardRecord, divergence, held_out, is_worse, output_errors
from h1export.quantize.methods.scale_search import plain_rows
from h1export.quantize.methods.stored import StoredIntegers
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.quantize.scheme import QuantScheme
from h1export.quantize.source import Rounded

SCHEME = QuantScheme("int4", 32, "gptq")


@pytest.mark.parametrize(("sequences", "held"), [(1, 0), (2, 1), (4, 1), (39, 1), (40, 2), (200, 10)])
def test_how_many_sequences_are_held_out(sequences: int, held: int) -> None:
    assert held_out(sequences) == held


def test_errors_are_those_of_the_outputs() -> None:
    rng = np.random.default_rng(0)
    weight, one, other = rng.standard_normal((3, 6, 8)).astype(np.float32)
    pairs = [tuple(torch.from_numpy(rng.standard_normal((n, 8)).astype(np.float32)) for _ in range(2)) for n in (5, 3)]
    wanted = [
        sum(np.square(x.numpy() @ candidate.T - t.numpy() @ weight.T).sum() for t, x in pairs)
        for candidate in (one, other)
    ]
    np.testing.assert_allclose(output_errors(weight, [one, other], pairs), wanted, rtol=1e-5)  # type: ignore[arg-type]


def test_divergence_is_that_of_the_predictions() -> None:
    rng = np.random.default_rng(1)
    head, candidate = torch.from_numpy(rng.standard_normal((2, 20, 8)).astype(np.float32))
    t, x = torch.from_numpy(rng.standard_normal((2, 300, 8)).astype(np.float32))  # more positions than a block has
    p, q = (
        torch.softmax(0.5 * values.double() @ weight.double().T, 1) for values, weight in ((t, head), (x, candidate))
    )
    wanted = float((p * (p.log() - q.log())).sum())
    assert divergence([(t, x)], head, candidate, multiplier=0.5) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("solved", "plain", "worse"),
    [
        (1, 2, False),
        (2, 1, True),
        (1, 1, False),
        (0, 0, False),
        (np.nan, 1, True),
        (np.inf, 1, True),
        (1, np.nan, True),
    ],
)
def test_what_is_worse(solved: float, plain: float, worse: bool) -> None:
    assert is_worse(np.array([solved, plain])) == worse


def test_a_record_is_json_of_few_digits() -> None:
    record = GuardRecord(2, {"a": np.array([np.nan, 1.23456789])}, {"scales": np.array([1.0, 2.0])})
    assert record.described() == {
        "sequences": 2,
        "plain": {"a": {"solved": None, "plain": 1.2346}},
        "steps": {"scales": {"after": 1.0, "before": 2.0, "kept": True}},
    }


def random_ids(config: FalconH1Config, samples: int, length: int = 60) -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(0).integers(0, config.vocab_size, (samples, length))


def plain_of(checkpoint: Path) -> Rounded:
    config = FalconH1Config.load(checkpoint)
    return Rounded(WeightStore.open(checkpoint, config), SCHEME.precisions(config), plain_rows)


def solved(checkpoint: Path, folder: Path, ids: np.ndarray) -> StoredIntegers:  # type: ignore[type-arg]
    rest = plain_of(checkpoint)
    folder.mkdir(exist_ok=True)
    config = FalconH1Config.load(checkpoint)
    return solve_model(rest.store, config, rest, ids=ids, stage=Stage(folder, 2), progress=SILENT)


def is_plain(integers: StoredIntegers, rest: Rounded, name: str) -> bool:
    found, plain = (one.rows(name, 0, rest.store.shape(name)[0]) for one in (integers, rest))
    return bool(np.array_equal(found.codes, plain.codes) and np.array_equal(found.scales, plain.scales))


@pytest.mark.parametrize("broken", ["model.layers.1.mamba.out_proj.weight", LM_HEAD])
def test_a_broken_solver_is_caught(
    broken: str, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one tensor alone, whose plain integers are stored and whose two errors are recorded."""
    right = solved_file.solve_rows

    def wrong(*arguments: Any, name: str) -> QuantizedTensor:
        found = right(*arguments, name=name)
        return QuantizedTensor(-found.codes, found.scales, found.row_scale) if name == broken else found

    monkeypatch.setattr(solved_file, "solve_rows", wrong)
    checkpoint = make_checkpoint("plain")
    rest = plain_of(checkpoint)
    integers = solved(checkpoint, tmp_path / "stage", random_ids(FalconH1Config.load(checkpoint), 8))
    record = integers.guard
    assert record.sequences == 1
    assert record.plain[broken][0] > record.plain[broken][1] > 0
    assert set(record.plain) == {name for name in integers.errors if is_plain(integers, rest, name)}
    assert len(record.plain) < len(integers.errors) / 2
    again = solved(checkpoint, tmp_path / "stage", random_ids(FalconH1Config.load(checkpoint), 8))  # from the file
    assert again.guard.described() == record.described()


def test_an_overfit_is_caught(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three sequences of one token each: what is solved on them is worse than plain rounding on the fourth."""
    checkpoint = make_checkpoint("plain")
    ids = random_ids(FalconH1Config.load(checkpoint), 4)
    ids[:3] = np.arange(3)[:, None]
    guarded = solved(checkpoint, tmp_path / "guarded", ids)
    found = {name: guarded.errors_of(name) for name in guarded.errors}
    caught = guarded.guard.plain
    assert len(caught) > len(found) / 3
    assert all(errors[0] > errors[1] for errors in caught.values())
    rest = plain_of(checkpoint)
    assert all(is_plain(guarded, rest, name) == (name in caught) for name in found)
    monkeypatch.setattr(solved_file, "is_worse", lambda _: False)
    loose = solved(checkpoint, tmp_path / "loose", ids)
    assert not any(is_plain(loose, rest, name) for name in found), "otherwise the guard had nothing to do"


def test_a_single_sequence_has_no_guard(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint("plain")
    integers = solved(checkpoint, tmp_path / "stage", random_ids(FalconH1Config.load(checkpoint), 1))
    assert integers.guard.described() == {"sequences": 0, "plain": {}}


def test_worse_factors_of_awq_are_dropped(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a search that chooses the worst."""
    checkpoint = make_checkpoint("plain")
    config = FalconH1Config.load(checkpoint)
    store = WeightStore.open(checkpoint, config)
    monkeypatch.setattr(awq, "EXPONENTS", (6.0,))
    factors = awq.search_scales(
        store, config, SCHEME.precisions(config), ids=random_ids(config, 4), jobs=1, progress=SILENT
    )
    assert factors.guard is not None
    assert set(factors.guard.plain) == set(factors.columns)
    assert all((values == 1).all() for values in (*factors.columns.values(), *factors.rows.values()))
    assert all(errors[0] > errors[1] for errors in factors.guard.plain.values())
