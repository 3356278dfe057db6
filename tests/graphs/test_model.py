"""The traced model, before and after the passes, against transformers' full forward, for every switch of the config."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from program_runner import ProgramRunner

from h1export.model.falcon_h1.states import Array, Ids

Result = tuple[Array, dict[str, Array]]
Deviation = Callable[[Result, Result], float]

TOLERANCE = 1e-5  # of each tensor's range; float32 on both sides leaves about 1e-6 in two layers
CHUNKS = {
    "one token": [1],
    "shorter than the convolution": [2],
    "longer than an SSM chunk": [37],
    "ragged chunks": [7, 16, 1, 2, 33, 11],
    "64 single steps": [6, *[1] * 64],
}
PADDED = (37, 5, 1)  # real tokens per row: the last is shorter than the convolution


BOTH = pytest.mark.parametrize("stage", ["unfolded", "passed"])


@BOTH
@pytest.mark.parametrize("name", CHUNKS)
def test_a_row_is_transformers_full_forward(name: str, stage: str, lab: Any, deviation: Deviation) -> None:
    chunks = CHUNKS[name]
    assert deviation(lab.run(getattr(lab, stage), chunks), lab.reference(lab.tokens[: sum(chunks)])) < TOLERANCE


def left_padded(rows: list[Array], pad: int) -> tuple[Ids, Ids]:
    """input_ids and attention_mask."""
    width = max(len(row) for row in rows)
    ids = np.stack([np.concatenate([np.full(width - len(row), pad), row]) for row in rows]).astype(np.int64)
    return ids, np.stack([np.arange(width) >= width - len(row) for row in rows]).astype(np.int64)


def run_batch(runner: ProgramRunner, rows: list[Array], chunks: list[int]) -> list[Result]:
    """A left-padded batch in calls of so many columns: every row's logits and states at its real tokens, in order.

    Pads are ordinary token ids, so that a leak shows.
    """
    ids, mask = left_padded(rows, pad=7)
    states = runner.initial(len(rows))
    outputs = []
    done = 0
    for chunk in chunks:
        logits, states = runner.step(ids[:, done : done + chunk], mask[:, : done + chunk], states)
        outputs.append(logits)
        done += chunk
    logits = np.concatenate(outputs, axis=1)
    snapshot = runner.snapshot(states)
    assert np.isfinite(logits).all()
    results = []
    for index, row in enumerate(rows):
        pads = ids.shape[1] - len(row)
        real = {
            key: state[index][:, pads:] if key.endswith(("key", "value")) else state[index]
            for key, state in snapshot.items()
        }
        results.append((logits[index, pads:], real))
    return results


@BOTH
@pytest.mark.parametrize("chunks", [[37], [30, 7]], ids=["one prefill", "a prefill in which short rows are all pads"])
def test_every_row_of_a_padded_batch_is_the_row_alone(
    chunks: list[int], stage: str, lab: Any, deviation: Deviation
) -> None:
    """Prefill, then three decode steps."""
    rows = [lab.tokens[: count + 3] for count in PADDED]
    results = run_batch(lab.runner(getattr(lab, stage)), rows, [*chunks, 1, 1, 1])
    for row, result in zip(rows, results, strict=True):
        assert deviation(result, lab.reference(row)) < TOLERANCE


@settings(deadline=None, max_examples=25, derandomize=True)
@given(lengths=st.lists(st.integers(1, 25), min_size=1, max_size=3), cuts=st.sets(st.integers(1, 24), max_size=5))
def test_any_batch_in_any_chunks(lengths: list[int], cuts: set[int], full_lab: Any, deviation: Deviation) -> None:
    rows = [full_lab.tokens[5 * index : 5 * index + length] for index, length in enumerate(lengths)]
    bounds = [0, *sorted(cut for cut in cuts if cut < max(lengths)), max(lengths)]
    results = run_batch(full_lab.runner(full_lab.passed), rows, [stop - start for start, stop in pairwise(bounds)])
    for row, result in zip(rows, results, strict=True):
        assert deviation(result, full_lab.reference(row)) < TOLERANCE
