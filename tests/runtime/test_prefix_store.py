"""PrefixStore and Prompt over a model whose states tell every token and every call: what is found, and what is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateSpec
from h1export.runtime.generation import PREFILL_CHUNK, calls
from h1export.runtime.prefix_store import PrefixStore
from h1export.runtime.prompt import EVERY, Prompt
from h1export.runtime.runner import Limits
from h1export.runtime.saved_states import SavedStates, check_part

PRIME = 9973
SIZES = {"num_hidden_layers": 1, "num_key_value_heads": 1, "max_position_embeddings": 3000}
Config = Callable[..., FalconH1Config]


@dataclass
class Divided:
    """A session whose states depend on the tokens and on the calls that they came in, as those of int8 kernels do."""

    config: FalconH1Config
    length: int = 0
    columns: list[int] = field(default_factory=list)
    sum: int = 0

    def append(self, ids: Any, *, keep: int | None = None) -> Any:
        for token in ids[0].tolist():
            self.sum = (3 * self.sum + token + 1) % PRIME
            self.columns.append(self.sum)
        self.sum = (7 * self.sum + ids.shape[1]) % PRIME
        self.length += ids.shape[1]
        return np.array([[[self.sum, sum(self.columns) % PRIME]]], np.float32)

    def save(self, row: int = 0, start: int = 0) -> SavedStates:
        check_part(row, 1, start, length=self.length)
        spec = StateSpec.of(self.config)
        arrays = {tensor.key: np.full(tensor.sized(1, self.length), self.sum, np.float32) for tensor in spec.tensors}
        for tensor in spec.tensors:
            if tensor.kind.grows:
                arrays[tensor.key][:] = np.array(self.columns)[None, None, :, None]
        return SavedStates.of(spec, arrays, 0, start=start, length=self.length)

    def restore(self, saved: SavedStates) -> None:
        saved.check(StateSpec.of(self.config))
        self.length = saved.length
        self.columns = saved.arrays["0.key"][0, 0, :, 0].astype(int).tolist()
        self.sum = int(saved.arrays["0.recurrent_state"].flat[0])


@dataclass
class Runner:
    config: FalconH1Config
    limits: Limits = field(default_factory=Limits)

    def start(self, batch: int, capacity: int) -> Divided:
        return Divided(self.config)


@pytest.fixture(scope="module")
def runner(config_of: Config) -> Any:
    return Runner(config_of(**SIZES))


def answer(runner: Any, store: PrefixStore | None, ids: Sequence[int], borders: Sequence[int] = ()) -> Any:
    prompt = Prompt(runner, store, ids, borders=borders)
    while not prompt.is_done:
        logits = prompt.session.append(prompt.next())
        prompt.extended()
    return logits.tolist(), prompt.reused


def check_tree(store: PrefixStore, spec: StateSpec, budget: int) -> None:
    """The bytes are those of the arrays; every leaf is a point, and the path to a point has its keys and values."""
    found, points, nodes = 0, 0, list(store._root.children.values())
    while nodes:
        node = nodes.pop()
        nodes += node.children.values()
        arrays = [*node.growing.values(), *(node.fixed or {}).values()]
        assert all(array.base is None for array in arrays)  # a view would keep what was dropped
        found += node.key.nbytes + sum(array.nbytes for array in arrays)
        assert node.fixed is not None or node.children
        points += node.fixed is not None
        assert node.end == node.parent.end + len(node.key)
        assert all(array.shape[2] == len(node.key) for array in node.growing.values())
    assert (found, points) == (store.nbytes, len(store))
    assert found <= budget


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_trees_of_conversations(data: st.DataObject, config_of: Config) -> None:
    """The answer is that of a fresh run, whatever was computed and forgotten before; the budget holds."""
    made: Any = Runner(config_of(**SIZES))
    spec = StateSpec.of(made.config)
    budget = data.draw(st.sampled_from((0, 1, 3, 8, 50))) * spec.nbytes(1, PREFILL_CHUNK)
    store = PrefixStore(spec, budget)
    known: list[tuple[list[int], list[int]]] = [([], [])]
    for _ in range(data.draw(st.integers(1, 10))):
        ids, borders = data.draw(st.sampled_from(known))
        cut = data.draw(st.integers(0, len(ids)))
        # one token repeated, so that prompts agree by chance for longer than a call
        ids = [*ids[:cut], *[data.draw(st.integers(0, 1))] * data.draw(st.integers(1, 2 * PREFILL_CHUNK))]
        borders = [border for border in borders if border <= cut]
        borders += data.draw(st.lists(st.integers(0, len(ids) + 1), max_size=2))
        found, reused = answer(made, store, ids, borders)
        assert found == answer(made, None, ids, borders)[0]
        assert reused < len(ids)
        assert store.shared([2 * ids[0]]) in (0, 1)
        check_tree(store, spec, budget)
        known.append((ids, borders))
    store.clear()
    check_tree(store, spec, 0)


def test_what_is_reused(runner: Any) -> None:
    """Borders of messages at once, a repeated prompt up to its last call, and what two share from the third on."""
    spec = StateSpec.of(runner.config)
    store = PrefixStore(spec, 1 << 30)
    talk = list(range(300))
    assert answer(runner, store, talk, [290])[1] == 0
    assert answer(runner, store, talk, [290])[1] == 290
    assert answer(runner, store, [*talk, *range(50)], [290, 340])[1] == 290
    assert answer(runner, store, [*talk, *range(50)], [290])[1] == 290
    assert [answer(runner, store, talk)[1] for _ in range(2)] == [0, 2 * PREFILL_CHUNK]  # other calls from 256 on
    assert answer(runner, store, talk[:291], [5])[1] == 0  # other calls from the beginning
    long = [7] * (2 * EVERY + 10)
    assert answer(runner, store, long)[1] == 0
    assert answer(runner, store, [*long[: EVERY + 1], 8])[1] == EVERY
    shared = [9] * (3 * PREFILL_CHUNK + 5)
    prompts = [[*shared, *[token] * 200] for token in range(3)]
    assert [answer(runner, store, prompt)[1] for prompt in prompts] == [0, 0, 3 * PREFILL_CHUNK]


def test_a_stale_point_is_seen(runner: Any) -> None:
    """The test of the tests: with another point's states, the answer is another."""
    store = PrefixStore(StateSpec.of(runner.config), 1 << 30)
    ids = list(range(400))
    truth = answer(runner, store, ids, [100, 200])[0]
    points = {node.end: node for node in store._points}
    points[384].fixed = points[200].fixed
    found, reused = answer(runner, store, ids, [100, 200])
    assert (reused, found != truth) == (384, True)
    points[384].fixed = None
    del store._points[points[384]]
    points[200].growing = {key: array + 1 for key, array in points[200].growing.items()}
    found, reused = answer(runner, store, ids, [100, 200])
    assert (reused, found != truth) == (200, True)


def test_the_point_used_last_stays(runner: Any) -> None:
    spec = StateSpec.of(runner.config)
    size = spec.nbytes(1, 100) + 8 * 100
    store = PrefixStore(spec, 2 * size)
    prompts = [[token] * 101 for token in range(3)]
    for prompt in (*prompts[:2], prompts[0], prompts[2]):
        answer(runner, store, prompt, [100])
    assert [answer(runner, store, prompt, [100])[1] for prompt in (prompts[0], prompts[2])] == [100, 100]
    assert store.shared([2] * 100) == 0
    assert len(store) == 2
    assert not store.add([0] * (size // 4), lambda _: pytest.fail("is not asked for what has no room"))
    assert len(store) == 2


@pytest.mark.parametrize("borders", [[], [1], [100, 128, 300], [5, 6, 7]])
def test_calls_of_a_part_are_those_of_the_whole(borders: list[int]) -> None:
    whole = list(calls(0, 700, borders))
    assert whole[0][0] == 0
    assert whole[-1][1] == 700
    assert all(before[1] == after[0] for before, after in pairwise(whole))
    assert {end for _, end in whole} == {*borders, *range(PREFILL_CHUNK, 700, PREFILL_CHUNK), 700}
    for place, (start, _) in enumerate(whole):
        assert list(calls(start, 700, borders)) == whole[place:]
    assert list(calls(7, 7)) == []


def test_prompts_that_do_not_fit(runner: Any) -> None:
    with pytest.raises(H1ExportError, match="has no tokens"):
        Prompt(runner, None, [])
    with pytest.raises(H1ExportError, match="has 3000 tokens, and the model's context is 3000; shorten it"):
        Prompt(runner, None, [1] * 3000)
