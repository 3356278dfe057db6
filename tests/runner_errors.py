"""How far the results of a Runner are from transformers', over calls of several lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from h1export.model.falcon_h1.states import StateSpec
from h1export.runtime.runner import Comparable
from h1export.validate.accuracy.logits import relative_error
from h1export.validate.accuracy.reference import Reference
from h1export.validate.accuracy.states import state_errors


def worst(runner: Comparable[Any], reference: Reference, calls: Sequence[int]) -> tuple[float, float]:
    """Return the errors of logits and states, relative to their ranges, of random tokens in calls of so many each."""
    ids = np.random.default_rng(0).integers(0, runner.config.vocab_size, (1, sum(calls)), dtype=np.int64)
    states = runner.initial(1)
    logits = []
    end = 0
    for tokens in calls:
        end += tokens
        answer, states = runner.step(ids[:, end - tokens : end], np.ones((1, end), np.int64), states)
        logits.append(answer[0])
    truth, true_states = reference.full(ids[0])
    found = {key: state[0] for key, state in runner.snapshot(states).items()}
    errors = state_errors([(found, true_states)], StateSpec.of(runner.config))
    return relative_error(np.concatenate(logits), truth), max(errors.values())
