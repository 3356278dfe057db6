"""Loops, branches and states; the checks of inputs, and of declared against computed types; the range of fp16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.errors import H1ExportError
from h1export.targets.coreml.evaluator import Evaluator, Package

PROPERTY = settings(deadline=None, max_examples=15, derandomize=True)
FLOATS = ("fp32", (3,))
HALVES = ("fp16", (3,))
INT = ("int32", ())
BOOL = ("bool", ())
X = np.array([1, 2, 3], np.float32)
H = X.astype(np.float16)

Load = Callable[..., Evaluator]


@pytest.fixture(scope="session")
def load(mil: Any) -> Load:
    """load(inputs, operations, outputs, states) -> the evaluator of a saved program of one function."""
    return lambda *parts, states=None: Evaluator(Package.open(mil.save({"main": mil.function(*parts, states=states)})))


def i32(value: int) -> np.ndarray:
    return np.asarray(value, np.int32)


def while_loop(
    mil: Any, variables: Sequence[tuple[str, Any]], condition: Sequence[Any], *, body: Sequence[Any], results: list[str]
) -> Any:
    """Return a loop over ``variables``, whose names have the prefix ``b`` in its blocks.

    It goes on while ``c`` is true; ``results`` names the next values of the variables.
    """
    blocks = [
        mil.block({f"{prefix}{name}": kind for name, kind in variables}, operations, outputs)
        for prefix, operations, outputs in (("a", condition, ["c"]), ("b", body, results))
    ]
    return mil.op(
        "while_loop",
        {"loop_vars": [name for name, _ in variables]},
        {f"out_{name}": kind for name, kind in variables},
        blocks=blocks,
    )


def counting(mil: Any, body: Sequence[Any], results: list[str]) -> Any:
    """Return a function that, while i < n, adds 1 to i and applies ``body`` to x."""
    condition = [mil.op("less", {"x": "ai", "y": "n"}, {"c": BOOL})]
    step = mil.op("add", {"x": "bi", "y": mil.value(1)}, {"next": INT})
    return while_loop(mil, [("i", INT), ("x", FLOATS)], condition, body=[step, *body], results=["next", *results])


LOOP_INPUTS = {"i": INT, "n": INT, "x": FLOATS}


@PROPERTY
@given(st.integers(-2, 3), st.integers(-2, 6))
def test_a_loop_runs_until_its_condition_fails(mil: Any, load: Load, start: int, end: int) -> None:
    body = [mil.op("mul", {"x": "bx", "y": "y"}, {"by": FLOATS})]  # y is of the block around it
    operations = [mil.op("add", {"x": "x", "y": mil.value(1.0)}, {"y": FLOATS}), counting(mil, body, ["by"])]
    found = load(LOOP_INPUTS, operations, ["out_i", "out_x"]).run({"i": i32(start), "n": i32(end), "x": X})
    assert found["out_i"] == max(start, end)
    assert np.array_equal(found["out_x"], X * (X + 1) ** max(end - start, 0))


def test_loops_within_loops(mil: Any, load: Load) -> None:
    """x is doubled n * n times, because the inner loop starts at zero each time."""
    zero = mil.const("zero", mil.value(0))
    inner_body = [
        mil.op("add", {"x": "bj", "y": mil.value(1)}, {"j2": INT}),
        mil.op("add", {"x": "bv", "y": "bv"}, {"v2": FLOATS}),
    ]
    blocks = [
        mil.block({"aj": INT, "av": FLOATS}, [mil.op("less", {"x": "aj", "y": "n"}, {"d": BOOL})], ["d"]),
        mil.block({"bj": INT, "bv": FLOATS}, inner_body, ["j2", "v2"]),
    ]
    inner = mil.op("while_loop", {"loop_vars": ["zero", "bx"]}, {"j": INT, "v": FLOATS}, blocks=blocks)
    evaluator = load(LOOP_INPUTS, [zero, counting(mil, [inner], ["v"])], ["out_x"])
    for n in (0, 1, 3):
        assert np.array_equal(evaluator.run({"i": i32(0), "n": i32(n), "x": X})["out_x"], X * 2 ** (n * n))


def test_a_loop_variable_may_grow(mil: Any, load: Load) -> None:
    grow = mil.op("concat", {"values": ["bx", "x"], "axis": mil.value(0)}, {"longer": ("fp32", (None,))})
    condition = [mil.op("less", {"x": "ai", "y": "n"}, {"c": BOOL})]
    body = [mil.op("add", {"x": "bi", "y": mil.value(1)}, {"next": INT}), grow]
    blocks = [
        mil.block({"ai": INT, "ax": FLOATS}, condition, ["c"]),
        mil.block({"bi": INT, "bx": FLOATS}, body, ["next", "longer"]),
    ]
    loop = mil.op("while_loop", {"loop_vars": ["i", "x"]}, {"j": INT, "y": ("fp32", (None,))}, blocks=blocks)
    found = load(LOOP_INPUTS, [loop], ["y"]).run({"i": i32(0), "n": i32(2), "x": X})["y"]
    assert np.array_equal(found, np.tile(X, 3))


def branch(mil: Any, outputs: dict[str, Any] | None = None) -> Any:
    """The result is x + 1 if p is true, else x squared; the branch that would fail is not run."""
    then = mil.block({}, [mil.op("add", {"x": "x", "y": mil.value(1.0)}, {"t": FLOATS})], ["t"])
    otherwise = mil.block(
        {}, [mil.op("gather", {"x": "x", "indices": "k", "axis": mil.value(0)}, {"o": FLOATS})], ["o"]
    )
    return mil.op("cond", {"pred": "p"}, outputs or {"y": FLOATS}, blocks=[then, otherwise])


def test_one_branch_runs(mil: Any, load: Load) -> None:
    evaluator = load({"x": FLOATS, "k": ("int32", (3,)), "p": BOOL}, [branch(mil)], ["y"])
    beyond = {"x": X, "k": np.array([2, 1, 9], np.int32)}
    assert np.array_equal(evaluator.run(beyond | {"p": np.asarray(True)})["y"], X + 1)
    assert evaluator.run({"x": X, "k": np.array([2, 1, 1], np.int32), "p": np.asarray(False)})["y"].tolist() == [
        3,
        2,
        2,
    ]
    with pytest.raises(H1ExportError, match="op gather 'o': has index 9 of axis 0"):
        evaluator.run(beyond | {"p": np.asarray(False)})


def test_what_decides_is_one_bool(mil: Any, load: Load) -> None:
    for kind, value in ((INT, i32(1)), (("bool", (2,)), np.array([True, True]))):
        evaluator = load({"x": FLOATS, "k": ("int32", (3,)), "p": kind}, [branch(mil)], ["y"])
        with pytest.raises(H1ExportError, match=r"op cond 'y': has a condition of .* instead of one bool"):
            evaluator.run({"x": X, "k": np.zeros(3, np.int32), "p": value})


@pytest.mark.parametrize("fault", ["blocks", "outputs", "results", "variables"])
def test_blocks_that_do_not_fit_their_op_are_refused(mil: Any, load: Load, fault: str) -> None:
    loop = counting(mil, [mil.op("exp", {"x": "bx"}, {"by": FLOATS})], ["by"])
    if fault == "blocks":
        del loop.blocks[1]
    elif fault == "outputs":
        del loop.outputs[1]
    elif fault == "results":
        del loop.blocks[1].outputs[1]
    else:
        del loop.blocks[0].inputs[1]
    with pytest.raises(H1ExportError, match=r"op while_loop 'out_i': has . inputs, outputs or blocks instead of 2"):
        load(LOOP_INPUTS, [loop], ["out_i"])


def test_values_that_are_handed_on_keep_their_type(mil: Any, load: Load) -> None:
    """A float32 value that is declared as fp16 would never be rounded."""
    loop = counting(mil, [mil.op("cast", {"x": "bx", "dtype": mil.value("fp16")}, {"by": HALVES})], ["by"])
    with pytest.raises(H1ExportError, match=r"op while_loop 'out_i': passes fp16\[3\] on as fp32\[3\]"):
        load(LOOP_INPUTS, [loop], ["out_i"])
    with pytest.raises(H1ExportError, match=r"op cond 'y': passes fp32\[3\] on as fp16\[3\]"):
        load({"x": FLOATS, "k": ("int32", (3,)), "p": BOOL}, [branch(mil, {"y": HALVES})], ["y"])


def test_names_of_a_block_end_with_it(mil: Any, load: Load) -> None:
    loop = counting(mil, [mil.op("exp", {"x": "bx"}, {"by": FLOATS})], ["by"])
    after = mil.op("exp", {"x": "by"}, {"z": FLOATS})
    with pytest.raises(H1ExportError, match="op exp 'z': takes 'by', which no earlier operation computes"):
        load(LOOP_INPUTS, [loop, after], ["z"])


STATE = {"s": HALVES}


def read(mil: Any, name: str) -> Any:
    return mil.op("read_state", {"input": "s"}, {name: HALVES})


def write(mil: Any, name: str) -> Any:
    return mil.op("write_state", {"input": "s", "data": name}, {})


def test_a_state_is_read_as_the_steps_before_left_it(mil: Any, load: Load) -> None:
    operations = [read(mil, "a"), mil.op("add", {"x": "a", "y": "x"}, {"b": HALVES}), write(mil, "b"), read(mil, "c")]
    operations += [mil.op("mul", {"x": "c", "y": "c"}, {"d": HALVES}), write(mil, "d"), read(mil, "e")]
    evaluator = load({"x": HALVES}, operations, ["a", "c", "e"], states=STATE)
    states = evaluator.initial_states()
    assert states["s"].dtype == np.float16
    first = evaluator.run({"x": H}, states)
    assert [first[name].tolist() for name in "ace"] == [[0, 0, 0], [1, 2, 3], [1, 4, 9]]
    second = evaluator.run({"x": H}, states)
    assert [second[name].tolist() for name in "ace"] == [[1, 4, 9], [2, 6, 12], [4, 36, 144]]
    assert states["s"].tolist() == [4, 36, 144]


@pytest.fixture
def adding(mil: Any, load: Load) -> Evaluator:
    """The function adds x to the state, returns it, and takes an element of it, which may not exist."""
    index = mil.op("gather", {"x": "b", "indices": "k", "axis": mil.value(0)}, {"e": ("fp16", ())})
    operations = [read(mil, "a"), mil.op("add", {"x": "a", "y": "x"}, {"b": HALVES}), write(mil, "b"), index]
    return load({"x": HALVES, "k": INT}, operations, ["b", "e"], states=STATE)


def test_a_run_that_fails_leaves_states_as_they_were(adding: Evaluator) -> None:
    states = adding.initial_states()
    adding.run({"x": H, "k": i32(0)}, states)
    before = states["s"]
    with pytest.raises(H1ExportError, match="has index 3"):
        adding.run({"x": H, "k": i32(3)}, states)
    assert states["s"] is before
    assert adding.run({"x": H, "k": i32(0)}, states)["b"].tolist() == [2, 4, 6]


def test_states_are_new_arrays_that_nobody_changes(adding: Evaluator) -> None:
    own = np.ones(3, np.float16)
    states = {"s": own}
    adding.run({"x": H, "k": i32(0)}, states)
    assert own.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="read-only"):
        states["s"][0] = 9
    kept = states["s"]
    adding.run({"x": H, "k": i32(0)}, states)
    assert kept.tolist() == [2, 3, 4]
    assert states["s"].tolist() == [3, 5, 7]


def test_a_state_that_the_caller_puts_in_counts(adding: Evaluator) -> None:
    """Two sequences alternate, and a state is set back, so that the values cached from the last run do not apply."""
    first = adding.initial_states()
    second = {"s": np.full(3, 10, np.float16)}
    adding.run({"x": H, "k": i32(0)}, first)
    back = dict(first)
    adding.run({"x": H, "k": i32(0)}, second)
    adding.run({"x": H, "k": i32(0)}, first)
    assert first["s"].tolist() == [2, 4, 6]
    assert second["s"].tolist() == [11, 12, 13]
    assert adding.run({"x": H, "k": i32(0)}, back)["b"].tolist() == [2, 4, 6]
    first["s"] = np.full(3, 5, np.float16)
    assert adding.run({"x": H, "k": i32(0)}, first)["b"].tolist() == [6, 7, 8]


def test_a_state_in_a_loop(mil: Any, load: Load) -> None:
    body = [read(mil, "r"), mil.op("add", {"x": "r", "y": "r"}, {"w": HALVES}), write(mil, "w")]
    evaluator = load(LOOP_INPUTS, [counting(mil, body, ["bx"])], ["out_i"], states=STATE)
    states = {"s": H}
    evaluator.run({"i": i32(0), "n": i32(3), "x": X}, states)
    assert states["s"].tolist() == [8, 16, 24]


def test_states_are_no_tensors(mil: Any, load: Load) -> None:
    with pytest.raises(H1ExportError, match="op exp 'y': takes state 's' as a tensor; read it with read_state first"):
        load({}, [mil.op("exp", {"x": "s"}, {"y": HALVES})], ["y"], states=STATE)
    with pytest.raises(H1ExportError, match="op read_state 'y': does not take a state as its input"):
        load({"x": HALVES}, [mil.op("read_state", {"input": "x"}, {"y": HALVES})], ["y"])
    with pytest.raises(H1ExportError, match=r"state 's' has no fixed shape: fp16\[\?\]"):
        load({}, [], [], states={"s": ("fp16", (None,))})


def test_a_state_is_written_in_its_own_shape_and_type(mil: Any, load: Load) -> None:
    evaluator = load({"x": ("fp16", (2,))}, [write(mil, "x")], [], states=STATE)
    states = evaluator.initial_states()
    with pytest.raises(H1ExportError, match=r"op write_state: writes shape \[2\] to state 's', which is fp16\[3\]"):
        evaluator.run({"x": H[:2]}, states)
    for dtype in ("fp32", "int32"):
        with pytest.raises(H1ExportError, match=rf"op write_state: passes {dtype}\[3\] on as fp16\[3\]; cast it first"):
            load({"x": (dtype, (3,))}, [write(mil, "x")], [], states=STATE)


GIVEN = {"x": H, "k": i32(0)}


@pytest.mark.parametrize(
    ("inputs", "what"),
    [
        ({"x": H}, r"input 'k': is missing; give it as int32\[\]"),
        (GIVEN | {"z": H}, "input 'z': does not exist; the function has x, k"),
        (GIVEN | {"x": X}, r"input 'x': is float32 \[3\], not fp16\[3\]; convert it first"),
        (GIVEN | {"x": H[:2]}, r"input 'x': is float16 \[2\], not fp16\[3\]"),
        (GIVEN | {"x": H[None]}, r"input 'x': is float16 \[1, 3\], not fp16\[3\]"),
        (GIVEN | {"k": np.asarray(0, np.int64)}, r"input 'k': is int64 \[\], not int32\[\]"),
    ],
)
def test_inputs_are_what_is_declared(adding: Evaluator, inputs: dict[str, np.ndarray], what: str) -> None:
    with pytest.raises(H1ExportError, match=f"function 'main', {what}"):
        adding.run(inputs, adding.initial_states())


@pytest.mark.parametrize(
    ("states", "what"),
    [
        (None, "state 's': is missing"),
        ({}, "state 's': is missing"),
        ({"s": X}, "state 's': is float32"),
        ({"s": H, "t": H}, "state 't': does not exist; the function has s"),
    ],
)
def test_states_are_what_is_declared(adding: Evaluator, states: dict[str, np.ndarray] | None, what: str) -> None:
    with pytest.raises(H1ExportError, match=f"function 'main', {what}"):
        adding.run(GIVEN, states)


def test_an_input_may_have_a_dimension_known_only_when_run(mil: Any, load: Load) -> None:
    kind = ("fp32", (None, 2))
    evaluator = load({"x": kind}, [mil.op("exp", {"x": "x"}, {"y": kind})], ["y"])
    for rows in (1, 4):
        assert evaluator.run({"x": np.zeros((rows, 2), np.float32)})["y"].shape == (rows, 2)
    with pytest.raises(H1ExportError, match=r"is float32 \[2, 3\], not fp32\[\?, 2\]"):
        evaluator.run({"x": np.zeros((2, 3), np.float32)})


def test_inputs_stay_as_they_are(mil: Any, load: Load) -> None:
    update = {"x": "x", "update": mil.value([9.0]), "begin": mil.value([0]), "end": mil.value([1])}
    x = X.copy()
    found = load({"x": FLOATS}, [mil.op("slice_update", update, {"y": FLOATS})], ["x", "y"]).run({"x": x})
    assert found["y"].tolist() == [9, 2, 3]
    found["x"][:] = 0
    assert x.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("op", "declared", "what"),
    [
        ("exp", ("fp32", (4,)), r"computes shape \[3\] for 'y', which is declared as fp32\[4\]"),
        ("exp", ("fp32", (1, 3)), r"computes shape \[3\] for 'y', which is declared as fp32\[1, 3\]"),
        ("exp", ("int32", (3,)), r"computes float32 for 'y', which is declared as int32\[3\]"),
        ("shape", ("fp16", (1,)), r"computes int32 for 'y', which is declared as fp16\[1\]"),
        ("shape", ("bool", (1,)), r"computes int32 for 'y', which is declared as bool\[1\]"),
    ],
)
def test_what_is_computed_is_what_is_declared(mil: Any, load: Load, op: str, declared: Any, what: str) -> None:
    with pytest.raises(H1ExportError, match=f"function 'main', op {op} 'y': {what}"):
        load({"x": FLOATS}, [mil.op(op, {"x": "x"}, {"y": declared})], ["y"]).run({"x": X})


def test_as_many_results_as_are_declared(mil: Any, load: Load) -> None:
    with pytest.raises(H1ExportError, match="op exp 'y': computes 1 results where 2 are declared"):
        load({"x": FLOATS}, [mil.op("exp", {"x": "x"}, {"y": FLOATS, "z": FLOATS})], ["y"]).run({"x": X})


def test_more_memory_than_any_machine_has_is_an_error_of_the_program(mil: Any, load: Load) -> None:
    fill = mil.op("fill", {"shape": "s", "value": mil.value(1.0)}, {"y": ("fp32", (None, None))})
    evaluator = load({"s": ("int32", (2,))}, [fill], ["y"])
    with pytest.raises(H1ExportError, match="op fill 'y': fails: Unable to allocate"):
        evaluator.run({"s": np.array([2**30, 2**30], np.int32)})


def test_overflow_and_nan_are_seen(mil: Any, load: Load) -> None:
    """``maxima`` has the largest fp16 results of all runs, before rounding.

    A NaN stays, and ops that only move values are not included.
    """
    operations = [
        mil.op("mul", {"x": "x", "y": "x"}, {"square": HALVES}),
        mil.op("sub", {"x": "square", "y": "square"}, {"zero": HALVES}),
        mil.op("reverse", {"x": "square"}, {"turned": HALVES}),
        mil.op("cast", {"x": "x", "dtype": mil.value("fp32")}, {"wide": FLOATS}),
        mil.op("mul", {"x": "wide", "y": "wide"}, {"wide_square": FLOATS}),
    ]
    evaluator = load({"x": HALVES}, operations, ["square", "zero", "turned", "wide_square"])
    assert evaluator.maxima == {}
    evaluator.run({"x": np.array([1, -200, 3], np.float16)})
    assert evaluator.maxima == {"square": 40000, "zero": 0}
    found = evaluator.run({"x": np.array([1, -300, 3], np.float16)})
    assert found["square"].tolist() == [1, np.inf, 9]
    assert found["wide_square"].tolist() == [1, 90000, 9]
    assert np.isnan(found["zero"][1])
    assert evaluator.maxima["square"] == 90000
    assert np.isnan(evaluator.maxima["zero"])
    evaluator.run({"x": np.array([1, 2, 3], np.float16)})
    assert evaluator.maxima["square"] == 90000
    assert np.isnan(evaluator.maxima["zero"])
    assert evaluator.maxima_by_op().keys() == {"mul", "sub"}
    assert evaluator.maxima_by_op()["mul"] == 90000
    assert np.isnan(evaluator.maxima_by_op()["sub"])


def test_every_result_is_rounded_where_it_is_declared_as_fp16(mil: Any, load: Load) -> None:
    """1 + 2^-11 is not an fp16 number, so the difference does not restore what the sum has lost."""
    for kind, expected in ((HALVES, 0.0), (FLOATS, 2.0**-11)):
        array = np.ones(3, np.float16 if kind is HALVES else np.float32)
        small = mil.value(np.asarray(2.0**-11, array.dtype))
        operations = [
            mil.op("add", {"x": "x", "y": small}, {"y": kind}),
            mil.op("sub", {"x": "y", "y": "x"}, {"z": kind}),
        ]
        assert load({"x": kind}, operations, ["z"]).run({"x": array})["z"].tolist() == [expected] * 3
