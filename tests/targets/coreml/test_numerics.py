"""The package, executed from disk, against transformers with the weights that it stores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runner_errors

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.progress import SILENT
from h1export.report.checks import CheckKind, Comparison
from h1export.validate.accuracy.logits import relative_error
from h1export.validate.accuracy.reference import Reference
from h1export.validate.accuracy.run import ValidateOptions, validate

# of the range
HALF = 3e-3
EXACT = 1e-5
FP16_STEP = 2.0**-10  # from a number to the next
CALLS = (70, 1, 1, 64, 5, 1, 17)  # whole and padded prefills, decodes between them

Build = Callable[..., Artifact]


def worst(artifact: Artifact, checkpoint: Path) -> tuple[float, float]:
    """Return the errors of logits and states over CALLS, relative to their ranges."""
    runner = load_runner(artifact)
    reference = Reference(checkpoint)
    reference.hold(runner.stored_weights())
    return runner_errors.worst(runner, reference, CALLS)


@pytest.mark.parametrize("quant", ["int4", "int8", "none"])
def test_the_embedded_model_in_fp16(quant: str, tiny: Path, build: Build) -> None:
    assert max(worst(build(tiny, quant, target="coreml", max_context=192), tiny)) <= HALF


def test_every_switch_in_fp16(checkpoint: Path, build: Build) -> None:
    assert max(worst(build(checkpoint, "int4", target="coreml", max_context=192), checkpoint)) <= HALF


def test_every_switch_is_exact_in_fp32(checkpoint: Path, build: Build) -> None:
    artifact = build(checkpoint, "int4", target="coreml", max_context=192, compute="fp32", state_io=True)
    assert max(worst(artifact, checkpoint)) <= EXACT


@pytest.mark.parametrize("chosen", [{"state_io": True}, {"compute": "fp32"}])
def test_fp16_is_where_it_is_asked_for_alone(chosen: dict[str, Any], tiny: Path, build: Build) -> None:
    assert EXACT < max(worst(build(tiny, "int4", target="coreml", max_context=192, **chosen), tiny)) <= HALF


def test_validate_passes_as_for_every_target(tiny: Path, build: Build) -> None:
    artifact = build(tiny, "int4", target="coreml", max_context=576)
    runner = load_runner(artifact)
    report = validate(artifact, runner, runner, checkpoint=tiny, options=ValidateOptions(pairs=1), progress=SILENT)
    assert report.passed, report.to_json()
    cases = {row.case: row for row in report.rows if row.comparison is Comparison.STORED}
    assert cases["512 decode steps"].figures["states"] <= HALF
    assert "at most 1 rows" in cases["padded batch of 3"].note
    (latency,) = [row for row in report.rows if row.kind is CheckKind.LATENCY]
    assert "evaluator" in latency.note


def test_only_the_last_logits(tiny: Path, build: Build) -> None:
    every, last = (build(tiny, "int4", target="coreml", max_context=192, logits=logits) for logits in ("all", "last"))
    ids = np.arange(70)[None]
    mask = np.ones((1, 70), np.int64)
    answers = [runner.step(ids, mask, runner.initial(1))[0] for runner in map(load_runner, (every, last))]
    assert answers[1].shape[1] == 1
    np.testing.assert_allclose(
        answers[1], answers[0][:, -1:], rtol=FP16_STEP
    )  # one row's product may be summed in another order


def test_the_buffer_is_used_to_its_last_row_and_no_further(tiny: Path, build: Build) -> None:
    """Tokens are decoded one by one where a padded prefill would not fit."""
    artifact = build(tiny, "int4", target="coreml", max_context=72)
    runner = load_runner(artifact)
    reference = Reference(tiny)
    reference.hold(runner.stored_weights())
    ids = np.random.default_rng(1).integers(0, runner.config.vocab_size, (1, 72), dtype=np.int64)
    _, states = runner.step(ids[:, :64], np.ones((1, 64), np.int64), runner.initial(1))
    logits, states = runner.step(ids[:, 64:], np.ones((1, 72), np.int64), states)
    assert relative_error(logits[0], reference.full(ids[0])[0][64:]) <= HALF
    with pytest.raises(H1ExportError, match=r"73 tokens, and the package has room for 72.*--max-context 73"):
        runner.step(ids[:, :1], np.ones((1, 73), np.int64), states)
    with pytest.raises(H1ExportError, match="room for 72"):
        runner.start(1, 73)


def test_one_state_serves_two_continuations(tiny: Path, build: Build) -> None:
    runner = load_runner(build(tiny, "int4", target="coreml", max_context=192))
    ids = np.arange(8)[None]
    ones = np.ones((1, 9), np.int64)
    _, states = runner.step(ids, ones[:, :8], runner.initial(1))
    first, _ = runner.step(np.array([[5]]), ones, states)
    runner.step(np.array([[9]]), ones, states)
    again, _ = runner.step(np.array([[5]]), ones, states)
    np.testing.assert_array_equal(first, again)


def test_held_sequences_answer_as_steps_do(tiny: Path, build: Build) -> None:
    runner = load_runner(build(tiny, "int4", target="coreml", max_context=192))
    session = runner.start(1, 100)
    states = runner.initial(1)
    end = 0
    for tokens in (70, 1, 3):
        ids = np.arange(tokens)[None] + end
        end = end + tokens
        expected, states = runner.step(ids, np.ones((1, end), np.int64), states)
        np.testing.assert_array_equal(session.append(ids), expected)
    with pytest.raises(H1ExportError, match="room for one of 100"):
        session.append(np.zeros((1, 40), np.int64))


def test_pads_and_batches_are_refused(tiny: Path, build: Build) -> None:
    runner = load_runner(build(tiny, "int4", target="coreml", max_context=192))
    with pytest.raises(H1ExportError, match="without padding"):
        runner.step(np.zeros((1, 2), np.int64), np.array([[0, 1]]), runner.initial(1))
    with pytest.raises(H1ExportError, match="one sequence at a time"):
        runner.initial(2)
