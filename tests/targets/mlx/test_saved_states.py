"""Saved states of mlx-lm's sessions, in float32 and in half precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from saved_sessions import CHECKS, check_chat, check_save_and_restore

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.runtime.runner import Runner


@pytest.fixture(params=["fp32", "fp16"])
def runner(request: pytest.FixtureRequest, spoken: Path, build: Callable[..., Artifact]) -> Runner[Any]:
    return load_runner(build(spoken, "int4", target="mlx", compute=request.param))


def test_save_and_restore(runner: Runner[Any]) -> None:
    check_save_and_restore(runner, 1)


@pytest.mark.parametrize(
    ("runner", "check"),
    # in half precision, calls of other sizes round otherwise
    [*(("fp32", check) for check in CHECKS), *(("fp16", check) for check in ("copy", "stale", "refused"))],
    indirect=["runner"],
)
def test_sessions(runner: Runner[Any], check: str) -> None:
    CHECKS[check](runner)


def test_states_stay_usable(runner: Runner[Any]) -> None:
    """Also where mlx-lm's buffers are full: 256 tokens."""
    ids = np.random.default_rng(0).integers(0, 259, (1, 258))
    for past in (5, 256):
        _, states = runner.step(ids[:, :past], np.ones((1, past), np.int64), runner.initial(1))
        one, other = ids[:, past : past + 1], ids[:, past + 1 : past + 2]
        mask = np.ones((1, past + 1), np.int64)
        first, _ = runner.step(one, mask, states)
        runner.step(other, mask, states)
        again, _ = runner.step(one, mask, states)
        assert np.array_equal(first, again)


def test_rows_and_pads_are_refused(runner: Runner[Any]) -> None:
    for ids, mask in ((np.ones((2, 3)), np.ones((2, 3))), (np.ones((1, 3)), np.array([[0, 1, 1]]))):
        with pytest.raises(H1ExportError, match="one sequence at a time"):
            runner.step(ids.astype(np.int64), mask.astype(np.int64), runner.initial(1))
    with pytest.raises(H1ExportError, match="2 rows"):
        runner.start(2, 8)
    with pytest.raises(H1ExportError, match="start with a larger capacity"):
        runner.start(1, 3).append(np.ones((1, 4), np.int64))


def test_chat(spoken: Path, build: Callable[..., Artifact], tmp_path: Path) -> None:
    check_chat(build(spoken, "int4", target="mlx", compute="fp32"), tmp_path / "out")
