"""The endurance checks, short: they pass on what there is, and fail on planted faults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endurance import cycles, long, sparse_model
from endurance.long import Watch

from h1export.artifact.artifact import Artifact
from h1export.targets.onnxruntime.bound_session import BoundSession

pytestmark = pytest.mark.ort
Build = Callable[..., Artifact]


@pytest.mark.parametrize("kernels", ["native", "stock"])
def test_loads(kernels: str, make_checkpoint: Callable[..., Path], build: Build) -> None:
    found = cycles.loads(build(make_checkpoint(num_hidden_layers=1)).folder, kernels, count=50)
    assert found.faults == []


def test_a_load_that_keeps_its_session_is_found(
    make_checkpoint: Callable[..., Path], build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(cycles.h1export, "load", _keeping(kept, cycles.h1export.load))
    found = cycles.loads(build(make_checkpoint(num_hidden_layers=1)).folder, "native", count=24)
    assert {"threads", "memory"} & {*found.faults}


def _keeping(kept: list[Any], load: Callable[..., Any]) -> Callable[..., Any]:
    def keep(*arguments: Any, **options: Any) -> Any:
        kept.append((load(*arguments, **options), np.ones(1 << 20)))
        return kept[-1][0]

    return keep


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, build: Build) -> Path:
    folder = tmp_path_factory.mktemp("long") / "checkpoint"
    long.long_context(folder, 400)
    return build(folder, "int4").folder


@pytest.fixture
def few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the memory eight times: each look takes a second in a process with this much in it."""
    monkeypatch.setattr(long, "BLOCKS", 8)


@pytest.mark.slow
@pytest.mark.usefixtures("few_looks")
@pytest.mark.parametrize("how", ["session", "hf"])
def test_long_texts(how: str, artifact: Path) -> None:
    """What 40 tokens end with is what a fresh run ends with; times are not judged here."""
    text, _ = long.run(artifact, how, 40)
    assert text.startswith("40 tokens")
    assert float(text.split(" of the range")[0].split()[-1]) <= long.TOLERANCE


@pytest.mark.usefixtures("few_looks")
def test_a_state_that_is_lost_on_the_way_is_found(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = BoundSession.append

    def forgetful(session: Any, *arguments: Any, **options: Any) -> Any:
        if session.length == 30:
            value = next(iter(session._states.values()))
            value.update_inplace(np.zeros_like(value.numpy()))
        return append(session, *arguments, **options)

    def tokens(artifact: Path, count: int, watch: Watch) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(BoundSession, "append", forgetful)
            return generated(artifact, count, watch)

    generated = long.session_tokens
    monkeypatch.setattr(long, "session_tokens", tokens)
    text, right = long.run(artifact, "session", 40)
    assert not right
    assert float(text.split(" of the range")[0].split()[-1]) > 10 * long.TOLERANCE


def test_the_sparse_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are where element 2^31 is, its file has them there, and the small model has the same."""
    assert sparse_model.VOCABULARY * sparse_model.HIDDEN > 2**31
    assert sparse_model.BORDER in sparse_model.ROWS
    assert {0, sparse_model.VOCABULARY - 1} <= {*sparse_model.ROWS.tolist()}
    assert len(np.unique(sparse_model.ROWS)) == len(sparse_model.ROWS)
    from safetensors import safe_open

    monkeypatch.setattr(sparse_model, "HIDDEN", 64)
    monkeypatch.setattr(sparse_model, "CONFIG", {**sparse_model.CONFIG, "hidden_size": 64, "vocab_size": 900})
    monkeypatch.setattr(sparse_model, "ROWS", np.array([0, 5, 899]))
    sparse_model.write(tmp_path / "large", tmp_path / "small")
    found = []
    for name in ("large", "small"):
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            found.append({key: file.get_tensor(key).float().numpy() for key in file.keys()})  # noqa: SIM118
    for name, array in found[0].items():
        if name in sparse_model.LARGE:
            assert np.array_equal(array[[0, 5, 899]], found[1][name])
            assert np.count_nonzero(array) == np.count_nonzero(found[1][name]) > 0
        else:
            assert np.array_equal(array, found[1][name])
