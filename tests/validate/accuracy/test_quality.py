"""Greedy texts and long contexts: the figures against plain loops, and planted faults that only they can see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.commands.validate import validate_artifact
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import StateSpec
from h1export.report.checks import CheckKind, Comparison
from h1export.report.report import Verdict
from h1export.validate.accuracy import greedy_agreement, long_contexts
from h1export.validate.accuracy.greedy_agreement import (
    PROMPT_TOKENS,
    Continuation,
    continuations,
    greedy_agreement_row,
    prompts,
    why_no_texts,
)
from h1export.validate.accuracy.logits import relative_error
from h1export.validate.accuracy.long_contexts import context_rows, cost_rows
from h1export.validate.accuracy.reference import Reference
from h1export.validate.accuracy.tolerances import tolerances_for

Build = Callable[..., Artifact]
MakeCheckpoint = Callable[..., Path]


def greedy(reference: Reference, prompt: Any, tokens: int) -> Any:
    """The reference's own text, one forward of all so far a token."""
    ids = prompt
    for _ in range(tokens):
        ids = np.append(ids, reference.full(ids)[0][-1].argmax())
    return ids[len(prompt) :]


def test_agreement_ends_at_the_first_token_that_differs(make_checkpoint: MakeCheckpoint) -> None:
    reference = Reference(make_checkpoint())
    prompt = np.arange(PROMPT_TOKENS)
    truth = greedy(reference, prompt, 12)
    assert Continuation(prompt, truth).agreed(reference) == 12
    for place in (0, 5, 11):
        wrong = truth.copy()
        wrong[place] = (wrong[place] + 1) % 259
        assert Continuation(prompt, wrong).agreed(reference) == place


@pytest.mark.ort
def test_greedy_texts_are_the_runners(
    make_checkpoint: MakeCheckpoint, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greedy_agreement, "NEW_TOKENS", 12)
    checkpoint = make_checkpoint()
    reference = Reference(checkpoint)
    starts = prompts(np.arange(200), 3, seed=0)
    texts = list(continuations(load_runner(build(checkpoint)), starts))
    for text, prompt in zip(texts, starts, strict=True):
        assert np.array_equal(text.tokens, greedy(reference, prompt, 12))
    assert greedy_agreement_row("source", texts, reference).figures == {"tokens": 12, "never": 1}
    texts[1].tokens[7] += 1
    texts[2].tokens[3] += 1
    row = greedy_agreement_row("source", texts, reference)
    assert row.figures == {"tokens": 7, "never": pytest.approx(1 / 3)}
    assert list(row.details.values()) == [12, 7, 3]


def test_prompts_are_stretches_of_the_text_and_come_again(make_checkpoint: MakeCheckpoint) -> None:
    ids = np.arange(100)
    found = prompts(ids, 5, seed=3)
    assert len(found) == 5
    assert all(np.array_equal(prompt, np.arange(prompt[0], prompt[0] + PROMPT_TOKENS)) for prompt in found)
    assert np.array_equal(found, prompts(ids, 5, seed=3))
    assert not np.array_equal(found, prompts(ids, 5, seed=4))
    assert prompts(ids[: PROMPT_TOKENS - 1], 5, seed=3) == []


@pytest.mark.parametrize("name", ["plain", "dt_limits", "odd_sizes", "norm_before_gate_three_groups"])
def test_the_reference_in_pieces_is_the_whole(name: str, make_checkpoint: MakeCheckpoint) -> None:
    reference = Reference(make_checkpoint(name))
    ids = np.random.default_rng(0).integers(0, 259, 97)
    truth, states = reference.full(ids)
    for chunk in (7, 32, 96):  # of 96, one token is left, which goes with the others
        found, found_states = reference.in_chunks(ids, 40, chunk)
        assert relative_error(found, truth[-40:]) < 1e-5
        assert all(relative_error(found_states[key], states[key]) < 1e-5 for key in states)


def test_a_reference_that_forgets_its_past_is_not_used(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = Reference(make_checkpoint())
    answer = reference._forward
    monkeypatch.setattr(reference, "_forward", lambda ids, cache, tail: answer(ids, None, tail))
    with pytest.raises(H1ExportError, match="does not continue a cache"):
        reference.in_chunks(np.arange(30), 4)


@pytest.mark.ort
def test_a_context_is_judged_to_its_end(
    make_checkpoint: MakeCheckpoint, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that leave the window after 96 tokens: right at 64, wrong at 128."""
    monkeypatch.setattr(long_contexts, "CHUNK", 32)
    checkpoint = make_checkpoint(max_position_embeddings=160)
    reference = Reference(checkpoint)
    runner = load_runner(build(checkpoint))
    tolerances = tolerances_for("none", "rtn", True, exact=True, chosen={})
    right = context_rows({Comparison.SOURCE: runner}, reference, (128, 64, 161), tolerances=tolerances, seed=0)
    assert {row.kind for row in right} == {CheckKind.CONTEXT}
    assert [(row.length, row.verdict) for row in right] == [
        (64, Verdict.PASS),
        (128, Verdict.PASS),
        (161, Verdict.NOT_APPLICABLE),
    ]
    assert right[0].details.keys() == {tensor.key for tensor in StateSpec.of(runner.config).tensors}
    step = runner.step
    name = "past_key_values.1.key"

    def windowed(ids: Any, mask: Any, states: Any) -> Any:
        logits, new = step(ids, mask, states)
        return logits, {
            **new,
            name: np.where(np.arange(new[name].shape[2])[:, None] < new[name].shape[2] - 96, 0, new[name]),
        }

    monkeypatch.setattr(runner, "step", windowed)
    wrong = context_rows({Comparison.SOURCE: runner}, reference, (64, 128), tolerances=tolerances, seed=0)
    assert [row.verdict for row in wrong] == [Verdict.PASS, Verdict.FAIL]
    assert wrong[1].note == "worst state 1.key"


@pytest.mark.ort
def test_costs_are_those_of_the_last_chunk_and_of_steps(
    make_checkpoint: MakeCheckpoint, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_contexts, "CHUNK", 32)
    runner = load_runner(build(make_checkpoint()))
    calls: list[int] = []

    def timed(sequence: Any, ids: Any) -> float:
        calls.append(ids.shape[1])
        sequence.append(ids)
        return float(ids.shape[1])

    monkeypatch.setattr(long_contexts, "_timed", timed)
    rows = cost_rows(runner, (20, 80), seed=0)
    assert [(row.kind, row.length) for row in rows] == [(CheckKind.CONTEXT_COST, 20), (CheckKind.CONTEXT_COST, 80)]
    assert calls == [12, *[1] * 8] * 2 + [8, 32, 32, *[1] * 8]
    assert [row.figures for row in rows] == [{"prefill_ms": 1e3, "decode_ms": 1e3}] * 2


@pytest.mark.ort
def test_validate_does_both(spoken_checkpoint: Path, build: Build) -> None:
    artifact = build(spoken_checkpoint, "int4", accuracy_level=4)
    report = validate_artifact(
        artifact.folder, spoken_checkpoint, {}, text_bytes=300, latency_pairs=0, prompts=2, contexts=[24]
    )
    kinds = (CheckKind.GREEDY_TEXT, CheckKind.CONTEXT, CheckKind.CONTEXT_COST)
    found = [(row.kind, row.length, row.comparison) for row in report.rows if row.kind in kinds]
    assert found == [
        *((CheckKind.GREEDY_TEXT, None, one) for one in (Comparison.SOURCE, Comparison.STORED, Comparison.DRIFT)),
        *((CheckKind.CONTEXT, 24, one) for one in (Comparison.STORED, Comparison.DRIFT)),
        (CheckKind.CONTEXT_COST, 24, Comparison.ALONE),
    ]
    assert report.passed


@pytest.mark.ort
def test_texts_that_do_not_fit_are_not_applicable(make_checkpoint: MakeCheckpoint, build: Build) -> None:
    runner = load_runner(build(make_checkpoint(max_position_embeddings=50)))
    assert "do not fit into 50" in why_no_texts(runner, [np.arange(PROMPT_TOKENS)])
    assert why_no_texts(load_runner(build(make_checkpoint())), []) == "not requested, or there is no text"
