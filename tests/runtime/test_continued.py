"""ContinuedSequence over a Runner whose states are known: what is computed, what is kept, and where it goes back to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateSpec
from h1export.runtime.continued import MOST_POINTS, ContinuedSequence, StoppedError
from h1export.runtime.generation import PREFILL_CHUNK
from h1export.runtime.runner import Limits
from h1export.runtime.saved_states import SavedStates, check_part

PRIME = 9973
Config = Callable[..., FalconH1Config]


@dataclass
class Memory:
    """A session whose keys are the tokens, and whose other states are a sum that depends on their order."""

    config: FalconH1Config
    capacity: int
    calls: list[int]
    length: int = 0
    tokens: list[int] = field(default_factory=list)
    sum: int = 0

    def append(self, ids: Any, *, keep: int | None = None) -> Any:
        assert self.length + ids.shape[1] <= self.capacity
        for token in ids[0]:
            self.sum = (3 * self.sum + int(token) + 1) % PRIME
        self.tokens[self.length :] = ids[0].tolist()
        self.length += ids.shape[1]
        self.calls.append(ids.shape[1])
        return logits_of(self.sum, self.tokens)[None, None]

    def save(self, row: int = 0, start: int = 0) -> SavedStates:
        check_part(row, 1, start, length=self.length)
        spec = StateSpec.of(self.config)
        arrays = {tensor.key: np.zeros(tensor.sized(1, self.length), np.float32) for tensor in spec.tensors}
        for key, array in arrays.items():
            if key.endswith(("key", "value")):
                array[:] = np.array(self.tokens)[None, None, :, None]
            else:
                array[:] = self.sum
        return SavedStates.of(spec, arrays, 0, start=start, length=self.length)

    def restore(self, saved: SavedStates) -> None:
        saved.check(StateSpec.of(self.config), self.capacity)
        self.length = saved.length
        self.tokens = saved.arrays["0.key"][0, 0, :, 0].astype(int).tolist()
        self.sum = int(saved.arrays["0.recurrent_state"].flat[0])


@dataclass
class Runner:
    config: FalconH1Config
    limits: Limits = field(default_factory=Limits)
    calls: list[int] = field(default_factory=list)
    sessions: list[Memory] = field(default_factory=list)

    def start(self, batch: int, capacity: int) -> Memory:
        self.sessions.append(Memory(self.config, capacity, self.calls))
        return self.sessions[-1]


def logits_of(total: int, tokens: list[int]) -> Any:
    return np.array([total, sum(tokens), len(tokens), *tokens[-3:]], np.float64)


def truth(ids: list[int]) -> Any:
    total = 0
    for token in ids:
        total = (3 * total + token + 1) % PRIME
    return logits_of(total, ids)


@pytest.fixture
def runner(config_of: Config) -> Any:
    return Runner(config_of(num_hidden_layers=1, max_position_embeddings=2000))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_trees_of_sequences(data: st.DataObject, config_of: Config) -> None:
    """The logits are those of the whole, whatever the sequence was before; after a prefix only the rest is computed."""
    made: Any = Runner(config_of(num_hidden_layers=1, max_position_embeddings=200))
    sequence = ContinuedSequence(made)
    known: list[list[int]] = [[]]
    tokens = st.lists(st.integers(0, 2), min_size=1, max_size=9)  # few ids, so that sequences often agree by chance
    for _ in range(data.draw(st.integers(1, 12))):
        ids = [*data.draw(st.sampled_from(known)), *data.draw(tokens)]
        points = data.draw(st.lists(st.integers(0, len(ids) + 2), max_size=3))
        before = list(sequence.ids)
        computed = sequence.computed
        assert np.array_equal(sequence.become(ids, points), truth(ids))
        assert sequence.ids == ids
        if ids[: len(before)] == before and len(before) < len(ids):
            assert sequence.computed - computed == len(ids) - len(before)
        assert sequence.computed == sum(made.calls)
        for token in data.draw(st.lists(st.integers(0, 2), max_size=4)):
            assert np.array_equal(sequence.append(token), truth(sequence.ids))
        known += [ids, list(sequence.ids)]
        assert len(sequence._points) <= MOST_POINTS


def test_a_point_is_come_back_to(runner: Any) -> None:
    sequence = ContinuedSequence(runner)
    prompt = list(range(50))
    sequence.become(prompt, [40])
    for token in range(5):
        sequence.append(token)
    runner.calls.clear()
    other = [*prompt[:40], 7, 8, 9]  # the beginning of the reply is another
    assert np.array_equal(sequence.become(other), truth(other))
    assert runner.calls == [3]
    runner.calls.clear()
    assert np.array_equal(sequence.become([1, 2]), truth([1, 2]))
    assert runner.calls == [2]
    longer = prompt[:10]
    sequence.become(longer)
    runner.calls.clear()
    sequence.become(longer)  # the same again: without a point, nothing says what follows its last token
    assert runner.calls == [10]


def test_what_states_cost(runner: Any) -> None:
    """Points share their keys and values: all together have every token once."""
    sequence = ContinuedSequence(runner)
    ids: list[int] = []
    for turn in range(20):
        ids += [turn] * 10
        sequence.become(ids, [len(ids) - 3])
    assert len(sequence._points) == MOST_POINTS
    spans = [(point.start, point.length) for point in sequence._points]
    assert spans[0] == (0, 7)
    assert [end for _, end in spans] == sorted({end for _, end in spans})
    assert [start for start, _ in spans[1:]] == [end for _, end in spans[:-1]]
    assert spans[-1][1] == len(ids) - 3


def test_room_grows_with_the_sequence_up_to_the_context(runner: Any) -> None:
    sequence = ContinuedSequence(runner)
    ids = list(range(100))
    sequence.become(ids)
    assert [session.capacity for session in runner.sessions] == [256]
    long = [*ids, *range(1100)]
    assert np.array_equal(sequence.become(long), truth(long))
    assert [session.capacity for session in runner.sessions] == [256, 1201]
    assert max(runner.calls) == PREFILL_CHUNK
    for token in range(10):
        assert np.array_equal(sequence.append(token), truth(sequence.ids))
    assert runner.sessions[-1].capacity == 2000
    with pytest.raises(H1ExportError, match="has 2000 tokens, and the context is 2000; shorten it"):
        sequence.become(list(range(2000)))
    assert len(sequence.ids) == 1210  # as before
    with pytest.raises(H1ExportError, match="has no tokens"):
        sequence.become([])
    full = list(range(1999))
    sequence.become(full)
    sequence.append(1)
    with pytest.raises(H1ExportError, match="the context of 2000 tokens is full"):
        sequence.append(1)
    runner.limits = Limits(max_context=10)
    assert ContinuedSequence(runner).context == 10


def test_a_stop_between_calls_leaves_states_of_the_tokens_before(runner: Any) -> None:
    sequence = ContinuedSequence(runner)
    ids = list(range(3 * PREFILL_CHUNK))
    asked = iter([False, False, True])
    with pytest.raises(StoppedError):
        sequence.become(ids, stop=lambda: next(asked))
    assert sequence.ids == ids[: 2 * PREFILL_CHUNK]
    assert np.array_equal(sequence.become(ids), truth(ids))
    assert runner.calls == [PREFILL_CHUNK] * 3


def test_a_failed_call_is_not_gone_on_from(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = ContinuedSequence(runner)
    sequence.become([1, 2, 3])

    def fail(self: Memory, ids: Any, *, keep: int | None = None) -> None:
        self.sum = 77  # half done
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Memory, "append", fail)
        with pytest.raises(KeyboardInterrupt):
            sequence.append(4)
    assert np.array_equal(sequence.become([1, 2, 3, 4]), truth([1, 2, 3, 4]))


def test_saved_sequences_go_on_elsewhere(runner: Any) -> None:
    sequence = ContinuedSequence(runner)
    with pytest.raises(H1ExportError, match="there are no tokens yet"):
        sequence.save()
    sequence.become([5, 6, 7], [2])
    other = ContinuedSequence(runner, sequence.save())
    sequence.append(1)
    runner.calls.clear()
    assert np.array_equal(other.become([5, 6, 7, 8]), truth([5, 6, 7, 8]))
    assert runner.calls == [1]


def test_parts_that_do_not_follow_each_other(runner: Any) -> None:
    session = runner.start(1, 50)
    session.append(np.arange(10)[None])
    spec = StateSpec.of(runner.config)
    first = session.save()
    with pytest.raises(H1ExportError, match="end at token 10, and the next ones begin at 4; join consecutive parts"):
        SavedStates.joined(spec, [first, session.save(start=4)])
