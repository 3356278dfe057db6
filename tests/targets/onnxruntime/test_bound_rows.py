"""Rows of different lengths in one call against sessions that compute each row alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.runtime.growing import GrowingSession
from h1export.runtime.rows import SeparateRows, open_rows
from h1export.runtime.runner import Runner
from h1export.targets.onnxruntime import bound_rows
from h1export.targets.onnxruntime.bound_rows import BoundRows

MOST = 10
CONTEXT = 90
FEW_COLUMNS = 8  # so that buffers grow and rows move
Build = Callable[..., Artifact]


@pytest.fixture(scope="module", params=["int4", "int8", "none"])
def runner(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], build: Build) -> Runner[Any]:
    """Activations are rounded to int8 where they can be; more than 8 rows would take another product otherwise.

    Keys and values have 16 bits beside int4, and are int8 beside int8.
    """
    path = make_checkpoint(max_position_embeddings=CONTEXT)
    how = {"int4": {"accuracy_level": 4, "kv": "fp16"}, "int8": {"accuracy_level": 4, "kv": "int8"}, "none": {}}[
        request.param
    ]
    return load_runner(build(path, request.param, **how), kernels="native")


def begun(runner: Runner[Any], tokens: int, seed: int) -> tuple[GrowingSession, int]:
    """A session that has ``tokens`` random tokens, and the likeliest one after them."""
    session = GrowingSession(runner)
    ids = np.random.default_rng(seed).integers(0, runner.config.vocab_size, (1, tokens))
    return session, int(session.append(ids)[0, -1].argmax())


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.integers(1, 40), st.integers(0, 99)),
        st.tuples(st.just("append"), st.sets(st.integers(0, MOST - 1)), st.integers(1, 12)),
        st.tuples(st.just("leave"), st.integers(0, MOST - 1), st.just(0)),
    ),
    min_size=4,
    max_size=14,
)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(steps=STEPS)
def test_rows_that_join_wait_and_leave_are_sessions_alone(runner: Runner[Any], steps: Any) -> None:
    """Bit for bit: some rows go on, others wait, and buffers grow in between."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bound_rows, "LEAST_COLUMNS", FEW_COLUMNS)
        rows = open_rows(runner, MOST)
        assert isinstance(rows, BoundRows)
        alone: list[list[Any]] = []  # of each row: its session, what Rows calls it, its last token
        for what, first, second in steps:
            if what == "join" and len(alone) < MOST:
                session, token = begun(runner, first, second)
                alone.append([session.fork(), rows.join(session), token])
            elif what == "leave" and first < len(alone):
                rows.leave(alone.pop(first)[1])
            elif what == "append":
                chosen = [row for place, row in enumerate(alone) if place not in first]
                for _ in range(second):
                    answers = rows.append({row[1]: row[2] for row in chosen})
                    assert len(answers) == len(chosen)
                    for row in chosen:
                        expected = row[0].append(np.array([[row[2]]]))[0, -1]
                        np.testing.assert_array_equal(answers[row[1]], expected)
                        row[2] = int(expected.argmax())


def test_an_error_is_its_own_row_s(runner: Runner[Any]) -> None:
    rows = open_rows(runner, MOST)
    (full, _), (wrong, _), (good, token) = (begun(runner, tokens, 1) for tokens in (CONTEXT, 3, 9))
    again = good.fork()
    places = [rows.join(session) for session in (full, wrong, good)]
    answers = rows.append(dict(zip(places, (1, runner.config.vocab_size, token), strict=True)))
    assert str(answers[places[0]]).startswith(f"append: the context of {CONTEXT} tokens is full")
    assert "the vocabulary is 0 to" in str(answers[places[1]])
    np.testing.assert_array_equal(answers[places[2]], again.append(np.array([[token]]))[0, -1])


def test_there_is_room_for_so_many_and_a_row_that_left_is_gone(runner: Runner[Any]) -> None:
    rows = open_rows(runner, 1)
    place = rows.join(begun(runner, 3, 0)[0])
    with pytest.raises(H1ExportError, match="are 1 already"):
        rows.join(begun(runner, 3, 0)[0])
    rows.leave(place)
    with pytest.raises(H1ExportError, match="has left"):
        rows.append({place: 1})
    assert rows.append({}) == {}
    rows.join(begun(runner, 3, 0)[0])


def test_stock_kernels_compute_rows_one_by_one(make_checkpoint: Callable[..., Path], build: Build) -> None:
    """The order in which they add depends on the number of rows."""
    runner = load_runner(build(make_checkpoint()), kernels="stock")
    rows = open_rows(runner, 2)
    assert isinstance(rows, SeparateRows)
    session, token = begun(runner, 5, 0)
    again = session.fork()
    place = rows.join(session)
    answers = rows.append({place: token})
    np.testing.assert_array_equal(answers[place], again.append(np.array([[token]]))[0, -1])
    assert isinstance(rows.append({place: -1})[place], H1ExportError)
