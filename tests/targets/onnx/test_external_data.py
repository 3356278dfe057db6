"""ExternalData: what lies where, in what order it is computed, and what a killed build finds again."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.artifact.journal import JOURNAL
from h1export.artifact.stage import Stage
from h1export.artifact.weight_file import in_order
from h1export.targets.onnx.external_data import PAGE, ExternalData

UINT8 = ir.DataType.UINT8
FLOAT = ir.DataType.FLOAT
SHAPES = [(3, 5), (40, 64), (300, 256), (1, 1), (1000, 100)]


class Killed(BaseException):
    """Stands for a SIGKILL: nothing that cleans up runs after it."""


def pair(number: int) -> tuple[Any, Any]:
    """Two tensors that one stream of blocks fills, like codes and scales."""
    shape = SHAPES[number]
    values = np.random.default_rng(number).integers(0, 256, shape).astype(np.uint8)
    return values, values.astype(np.float32).sum(axis=1, keepdims=True)


def blocks(number: int, computed: list[int], rows: int = 7) -> Iterator[Callable[[], Sequence[Any]]]:
    def block(start: int) -> Sequence[Any]:
        computed.append(number)
        return [tensor[start : start + rows] for tensor in pair(number)]

    return (partial(block, start) for start in range(0, SHAPES[number][0], rows))


def write(stage: Stage, computed: list[int], die_at: int = -1) -> bytes:
    """A small build. It dies when block ``die_at`` is asked for."""

    def dying(calls: Iterator[Callable[[], Sequence[Any]]]) -> Iterator[Callable[[], Sequence[Any]]]:
        for call in calls:
            if len(request) == die_at:
                raise Killed
            request.append(0)
            yield call

    request: list[int] = []
    with ExternalData(stage, "data") as data:
        for number, (rows, columns) in enumerate(SHAPES):
            tensors = [
                data.place(f"{number}.codes", UINT8, (rows, columns)),
                data.place(f"{number}.scales", FLOAT, (rows, 1)),
            ]
            data.fill(tensors, dying(blocks(number, computed)))
    return (stage.folder / "data").read_bytes()


def test_tensors_lie_where_they_say(tmp_path: Path) -> None:
    with ExternalData(Stage(tmp_path), "data") as data:
        placed = [data.place(str(number), UINT8, shape) for number, shape in enumerate(SHAPES)]
        for number, tensor in enumerate(placed):
            data.fill([tensor], [lambda number=number: [pair(number)[0]]])
        alias = data.alias("again", (40 * 64,), placed[1])
    for number, tensor in enumerate(placed):
        assert np.array_equal(tensor.numpy(), pair(number)[0])
        assert (tensor.offset or 0) % (PAGE if (tensor.length or 0) >= 1 << 16 else 64) == 0
    assert np.array_equal(alias.numpy(), pair(1)[0].reshape(-1))


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_the_same_bytes_however_many_threads(jobs: int, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    assert write(Stage(tmp_path / "many", jobs), []) == write(Stage(tmp_path / "one"), [])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(deaths=st.lists(st.integers(0, 200), max_size=4), jobs=st.integers(1, 3))
def test_a_killed_build_ends_with_the_same_bytes(
    deaths: list[int], jobs: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("stage")
    truth = write(Stage(tmp_path_factory.mktemp("truth")), [])
    for death in deaths:
        try:
            write(Stage(folder, jobs), [], death)
        except Killed:
            assert len((folder / "data").read_bytes()) <= len(truth)
    computed: list[int] = []
    lines = (folder / JOURNAL).read_text(encoding="utf-8").splitlines() if (folder / JOURNAL).is_file() else []
    whole = {json.loads(line)["tensor"].split(".")[0] for line in lines}
    assert write(Stage(folder, jobs), computed) == truth
    assert not whole & {str(number) for number in computed}


def test_a_tensor_that_was_changed_is_written_again(tmp_path: Path) -> None:
    truth = write(Stage(tmp_path), [])
    (tmp_path / "data").write_bytes(truth[:200] + b"\x99" + truth[201:])
    computed: list[int] = []
    assert write(Stage(tmp_path), computed) == truth
    assert set(computed) == {1}


def test_a_leftover_that_is_too_long_is_cut(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"\x99" * 300_000)
    with ExternalData(Stage(tmp_path), "data") as data:
        data.fill([data.place("0", UINT8, (8, 8))], [lambda: [np.ones((8, 8), np.uint8)]])
    assert (tmp_path / "data").read_bytes() == b"\x01" * 64


def test_a_plan_computes_nothing_and_knows_the_size(tmp_path: Path) -> None:
    (tmp_path / "dry").mkdir()
    (tmp_path / "wet").mkdir()
    computed: list[int] = []
    planned = write(Stage(tmp_path / "dry", dry=True), computed)
    assert not computed
    assert len(planned) == len(write(Stage(tmp_path / "wet"), []))
    assert (tmp_path / "dry" / "data").stat().st_blocks == 0


@pytest.mark.parametrize(("rows", "message"), [(5, "t: more bytes than its shape says"), (3, "t: 8 bytes missing")])
def test_rows_that_do_not_fit_are_misuse(rows: int, message: str, tmp_path: Path) -> None:
    with ExternalData(Stage(tmp_path), "data") as data, pytest.raises(ValueError, match=message):
        data.fill([data.place("t", UINT8, (4, 8))], [lambda: [np.ones((rows, 8), np.uint8)]])


@pytest.mark.parametrize("jobs", [1, 3])
def test_results_come_in_order_and_calls_run_little_ahead(jobs: int) -> None:
    begun = []
    lock = threading.Lock()

    def call(number: int) -> int:
        with lock:
            begun.append(number)
        return number

    for number, result in enumerate(in_order((partial(call, number) for number in range(20)), jobs)):
        assert result == number
        assert len(begun) <= number + 1 + jobs


@pytest.mark.parametrize("jobs", [1, 3])
def test_an_error_in_a_call_ends_it(jobs: int) -> None:
    begun: list[int] = []

    def call(number: int) -> int:
        begun.append(number)
        return 10 // (3 - number)

    with pytest.raises(ZeroDivisionError):
        list(in_order((partial(call, number) for number in range(100)), jobs))
    assert len(begun) < 10
