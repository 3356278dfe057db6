"""check_call: the inputs of Runner.step, the same for every runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.errors import H1ExportError
from h1export.runtime.runner import check_call


def call(ids: Any, mask: Any, past: int = 0, vocab: int = 10) -> None:
    check_call(np.array(ids, np.int64), np.array(mask, np.int64), past, vocab_size=vocab)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(batch=st.integers(1, 4), new=st.integers(1, 5), past=st.integers(0, 5), vocab=st.integers(1, 9), data=st.data())
def test_left_padding_of_any_length_is_accepted(
    batch: int, new: int, past: int, vocab: int, data: st.DataObject
) -> None:
    """Rows of nothing but padding among them, and both ends of the vocabulary."""
    ids = data.draw(
        st.lists(st.lists(st.integers(0, vocab - 1), min_size=new, max_size=new), min_size=batch, max_size=batch)
    )
    pads = data.draw(st.lists(st.integers(0, past + new), min_size=batch, max_size=batch))
    call(ids, [[0] * pad + [1] * (past + new - pad) for pad in pads], past, vocab)


@pytest.mark.parametrize(
    ("ids", "mask", "past"),
    [
        ([1, 2], [[1, 1]], 0),
        ([[[1]]], [[1]], 0),
        (np.zeros((1, 0)), np.zeros((1, 0)), 0),
        (np.zeros((0, 3)), np.zeros((0, 3)), 0),
        ([[1, 2]], [[1]], 0),
        ([[1, 2]], [[1, 1]], 1),
        ([[1, 2]], [[1, 1, 1]], 0),
        ([[1], [2]], [[1]], 0),
        ([[1, 2]], [1, 1], 0),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit(ids: Any, mask: Any, past: int) -> None:
    with pytest.raises(
        H1ExportError, match=rf"step: input_ids .*attention_mask .*after {past} tokens; expected \[batch, new\]"
    ):
        call(ids, mask, past)


@pytest.mark.parametrize("token", [-1, 10, 1 << 40])
def test_tokens_outside_the_vocabulary(token: int) -> None:
    with pytest.raises(H1ExportError, match=rf"step: token ids from .*{abs(token)}.*; the vocabulary is 0 to 9"):
        call([[5, token if token < 0 else 1, token if token > 0 else 2]], [[1, 1, 1]])


@pytest.mark.parametrize("mask", [[1, 1, 0], [0, 1, 0], [1, 0, 1]], ids=str)
def test_masks_that_are_not_left_padding(mask: list[int]) -> None:
    with pytest.raises(H1ExportError, match="step: attention_mask has a pad after a real token; pad on the left"):
        call([[1]], [mask], past=2)
    with pytest.raises(H1ExportError, match="pad on the left"):
        call([[1], [1]], [[1, 1, 1], mask], past=2)


@pytest.mark.parametrize("mask", [[0, 2, 2], [-1, 1, 1], [0, 0, -1]], ids=str)
def test_masks_of_other_values(mask: list[int]) -> None:
    with pytest.raises(H1ExportError, match="step: attention_mask has values besides 0 and 1"):
        call([[1]], [mask], past=2)
