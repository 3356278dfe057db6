"""The harness itself: figures, limits, verdicts, and the difference between lowering and quantisation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.tokenizer import load_tokenizer, scoring_ids
from h1export.commands.validate import validate_artifact
from h1export.errors import H1ExportError
from h1export.report.checks import CheckKind, Comparison, Phase
from h1export.report.report import Report, Row, Verdict
from h1export.validate.accuracy import tolerances
from h1export.validate.accuracy.latency import of_times, paired
from h1export.validate.accuracy.logits import logit_figures, relative_error
from h1export.validate.accuracy.perplexity import WINDOW, Scored, text_figures, windows
from h1export.validate.accuracy.run import _latency_row

Build = Callable[..., Artifact]


def test_relative_error_is_relative_to_the_truths_range() -> None:
    truth = np.array([[0.0, 4.0], [2.0, -6.0]], np.float32)
    assert relative_error(truth + np.float32(0.5), truth) == pytest.approx(0.05)
    assert math.isnan(relative_error(np.full_like(truth, np.nan), truth))
    assert (
        relative_error(np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32)) == 1.0
    )  # a constant truth has no range


def test_logit_figures_against_torch() -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((300, 17)).astype(np.float32)
    found = truth + 0.3 * rng.standard_normal((300, 17)).astype(np.float32)
    figures = logit_figures([(found, truth)])
    a = torch.log_softmax(torch.from_numpy(found).double(), -1)
    b = torch.log_softmax(torch.from_numpy(truth).double(), -1)
    assert figures["kl"] == pytest.approx(
        float(torch.nn.functional.kl_div(a, b, log_target=True, reduction="batchmean")), rel=1e-6
    )
    assert figures["top1"] == pytest.approx(float((a.argmax(-1) == b.argmax(-1)).double().mean()))
    assert 0 < figures["top1"] < 1


@pytest.mark.parametrize(
    ("figures", "tolerances", "verdict"),
    [
        ({"logits": 1e-6}, {"logits": 1e-5}, Verdict.PASS),
        ({"logits": 1e-4}, {"logits": 1e-5}, Verdict.FAIL),
        ({"logits": float("nan")}, {"logits": 1e-5}, Verdict.FAIL),
        ({"logits": float("nan")}, {}, Verdict.FAIL),
        ({"top1": 0.98}, {"top1": 0.99}, Verdict.FAIL),
        ({"top1": 1.0}, {"top1": 0.99}, Verdict.PASS),
        ({"top5": 0.98}, {"top5": 0.99}, Verdict.FAIL),
        ({"kl": 0.1}, {}, Verdict.INFO),
        ({}, {}, Verdict.NOT_APPLICABLE),
    ],
)
def test_verdicts(figures: dict[str, float], tolerances: dict[str, float], verdict: Verdict) -> None:
    row = Row(CheckKind.TEXT, Comparison.SOURCE, figures=figures, tolerances=tolerances)
    assert row.verdict is verdict
    report = Report({}, {}, (row,))
    assert report.passed is (verdict is not Verdict.FAIL)
    assert json.loads(report.to_json())["rows"][0]["verdict"] == verdict


def test_tolerances_can_be_set_and_must_exist() -> None:
    assert (
        tolerances.tolerances_for("int4", "rtn", True, exact=True, chosen={})["stored.logits"]
        == tolerances.EXACT["logits"]
    )
    assert (
        tolerances.tolerances_for("int4", "rtn", False, exact=True, chosen={})["drift.logits"]
        == tolerances.ROUNDED["logits"]
    )
    assert (
        tolerances.tolerances_for("int4", "rtn", False, exact=False, chosen={})["stored.logits"]
        == tolerances.HALF["logits"]
    )
    assert "drift.logits" not in tolerances.tolerances_for("int4", "rtn", False, exact=False, chosen={})
    assert tolerances.tolerances_for("none", "rtn", True, exact=True, chosen={"source.kl": 7.0})["source.kl"] == 7.0
    with pytest.raises(H1ExportError, match=r"stored\.logitz"):
        tolerances.tolerances_for("int4", "rtn", True, exact=True, chosen={"stored.logitz": 1.0})
    with pytest.raises(H1ExportError, match=r"stored\.kl"):
        tolerances.tolerances_for(
            "none", "rtn", True, exact=True, chosen={"stored.kl": 1.0}
        )  # nothing is quantised, so nothing is stored


def test_integers_are_judged_by_what_their_method_may_do() -> None:
    assert "weights.group" not in tolerances.tolerances_for("int4", "rtn", True, exact=True, chosen={})
    for method in ("search", "awq", "gptq"):
        found = tolerances.tolerances_for("int4", method, True, exact=True, chosen={})  # type: ignore[arg-type]
        assert found["weights.group"] == tolerances.GROUP
        assert "weights.steps" not in found


def test_windows_score_every_token_but_the_first_once() -> None:
    ids = np.arange(3 * WINDOW + 5)
    scored = np.concatenate([window[1:] for window in windows(ids)])
    assert np.array_equal(scored, ids[1:])
    assert max(len(window) for window in windows(ids)) == WINDOW + 1


def test_a_uniform_model_costs_log2_of_the_vocabulary() -> None:
    ids = np.arange(1000) % 50
    flat = np.zeros((WINDOW, 64), np.float32)
    figures = text_figures((Scored.of(flat, flat, window) for window in windows(ids)), 999)
    assert figures["artifact"] == figures["reference"] == pytest.approx(6.0)
    assert (figures["ratio"], figures["kl"], figures["kl_p99"], figures["top1"], figures["top5"]) == (1, 0, 0, 1, 1)


def test_text_figures_against_torch() -> None:
    """Over more positions than are held at a time."""
    rng = np.random.default_rng(0)
    length = 300
    vocab = 17
    scored = []
    kl = []
    same = []
    shared = []
    nats = [0.0, 0.0]
    for _ in range(4):
        truth = rng.standard_normal((length, vocab)).astype(np.float32)
        found = truth + 0.3 * rng.standard_normal(truth.shape).astype(np.float32)
        window = rng.integers(0, vocab, length + 1)
        scored.append(Scored.of(found, truth, window))
        a, b = (torch.log_softmax(torch.from_numpy(logits).double(), -1) for logits in (found, truth))
        kl.append((b.exp() * (b - a)).sum(-1))
        same.append(a.argmax(-1) == b.argmax(-1))
        best = (a.argsort(-1)[:, -5:], b.argsort(-1)[:, -5:])
        shared += [len(set(ours.tolist()) & set(theirs.tolist())) / 5 for ours, theirs in zip(*best, strict=True)]
        assert scored[-1].error == pytest.approx(np.abs(found - truth).max(1) / (truth.max() - truth.min()))
        targets = torch.from_numpy(window[1:])
        nats = [
            total + float(torch.nn.functional.nll_loss(log, targets, reduction="sum"))
            for total, log in zip(nats, (a, b), strict=True)
        ]
    figures = text_figures(scored, 1000)
    assert figures["artifact"] == pytest.approx(nats[0] / math.log(2) / 1000)
    assert figures["reference"] == pytest.approx(nats[1] / math.log(2) / 1000)
    assert figures["ratio"] == pytest.approx(nats[0] / nats[1])
    assert figures["kl"] == pytest.approx(float(torch.cat(kl).mean()))
    assert figures["kl_p99"] == pytest.approx(float(torch.cat(kl).quantile(0.99)))
    assert figures["top1"] == pytest.approx(float(torch.cat(same).double().mean()))
    assert figures["top5"] == pytest.approx(np.mean(shared))
    assert figures["top1"] < figures["top5"] < 1


def test_standard_errors_are_those_of_the_mean() -> None:
    """Windows of independent figures: s / sqrt(n), within the error of 500 resamples of 100 windows, about a tenth."""
    rng = np.random.default_rng(1)
    kl = rng.exponential(size=(100, 8))
    flat = np.ones(8)
    figures = text_figures([Scored(flat, flat, window, same=flat > 0, shared=flat, error=flat) for window in kl], 1)
    assert figures["kl_se"] == pytest.approx(kl.mean(axis=1).std() / 10, rel=0.2)
    assert figures["ratio_se"] == figures["top1_se"] == 0


@pytest.mark.ort
def test_bits_per_byte_equals_a_plain_transformers_loop(tiny: Path, build: Build) -> None:
    from transformers import FalconH1ForCausalLM

    text = (tiny / "heldout.txt").read_text(encoding="utf-8")[:6000]
    artifact = build(tiny)
    report = validate_artifact(artifact.folder, tiny, {}, text=None, text_bytes=6000, latency_pairs=0, prompts=0)
    (row,) = [row for row in report.rows if row.kind is CheckKind.TEXT]
    ids, nbytes = scoring_ids(tiny, text)
    model: Any = FalconH1ForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, WINDOW):
            window = torch.from_numpy(ids[start : start + WINDOW + 1])
            logits = model(window[None, :-1]).logits[0].double()
            nats += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    assert row.figures["artifact"] == pytest.approx(nats / math.log(2) / nbytes, rel=1e-4)
    assert row.figures["reference"] == pytest.approx(nats / math.log(2) / nbytes, rel=1e-4)


def test_scored_bytes_leave_out_the_first_token(tiny: Path) -> None:
    text = "définition of a module"
    ids, nbytes = scoring_ids(tiny, text)
    first = load_tokenizer(tiny).decode([int(ids[0])])
    assert nbytes == len(text.encode()) - len(first.encode())


@pytest.mark.ort
def test_lowering_and_quantisation_errors_are_told_apart(tiny: Path, build: Build) -> None:
    report = validate_artifact(build(tiny, "int4").folder, tiny, {}, text_bytes=2000, latency_pairs=0, prompts=0)
    assert report.passed, report.to_json()
    errors = {
        comparison: [
            row.figures["logits"] for row in report.rows if row.comparison is comparison and row.compares_outputs
        ]
        for comparison in (Comparison.STORED, Comparison.SOURCE)
    }
    assert len(errors[Comparison.STORED]) == len(errors[Comparison.SOURCE]) == 8
    assert max(errors[Comparison.STORED]) < 1e-5 < 1e-2 < min(errors[Comparison.SOURCE])


@pytest.mark.ort
def test_the_report_is_written_and_does_not_break_the_artifact(tiny: Path, build: Build) -> None:
    artifact = build(tiny, "int8")
    report = validate_artifact(artifact.folder, tiny, {}, text_bytes=1000, latency_pairs=1, prompts=0)
    assert json.loads((artifact.folder / "report.json").read_text()) == json.loads(report.to_json())
    Artifact.open(artifact.folder).check_hashes()
    assert Report.from_json(report.to_json(), "report") == report
    latency = {row.phase: row.figures for row in report.rows if row.kind is CheckKind.LATENCY}
    assert latency.keys() == set(Phase)
    assert all(figures["artifact_s"] > 0 and figures["reference_s"] > 0 for figures in latency.values())


@pytest.mark.ort
def test_another_checkpoint_than_the_source_is_refused(
    tiny: Path, make_checkpoint: Callable[..., Path], build: Build
) -> None:
    with pytest.raises(H1ExportError, match="was not built from"):
        validate_artifact(build(tiny).folder, make_checkpoint(), {})


@pytest.mark.ort
def test_a_checkpoint_without_tokenizer_shows_text_as_not_applicable(
    make_checkpoint: Callable[..., Path], build: Build
) -> None:
    checkpoint = make_checkpoint()
    report = validate_artifact(build(checkpoint).folder, checkpoint, {}, latency_pairs=0, prompts=0)
    verdicts = {row.kind: row.verdict for row in report.rows}
    assert verdicts[CheckKind.TEXT] is verdicts[CheckKind.LATENCY] is Verdict.NOT_APPLICABLE
    assert report.passed


def test_pairs_interleave_and_swap_their_order() -> None:
    calls: list[str] = []
    latency = paired(lambda: calls.append("a"), lambda: calls.append("r"), pairs=3)
    assert "".join(calls) == "ar" + "ra" + "ar" + "ra"
    assert latency.ratio > 0


@pytest.mark.parametrize(
    ("ratios", "exceeds"),
    [
        ([0.5] * 7, False),
        ([1.2] * 7, True),
        ([0.9, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2], None),  # one pair of seven is below
        ([0.9, *[1.2] * 11], True),  # one of twelve is not enough
        ([1.2], None),
        ([1.2] * 5, None),
        ([1.2] * 6, True),
        ([0.9, 0.9, 0.9, 0.9, 5.0, 5.0, 5.0], False),
    ],
    ids=str,
)
def test_a_latency_fails_only_where_the_pairs_agree(ratios: list[float], exceeds: bool | None) -> None:
    latency = of_times(ratios, [1.0] * len(ratios))
    assert latency.exceeds(1.0) is exceeds
    row = _latency_row(Phase.DECODE, latency, 1.0, note="pairs")
    assert row.verdict is {False: Verdict.PASS, True: Verdict.FAIL, None: Verdict.INFO}[exceeds]
    assert ("not judged" in row.note) is (exceeds is None)


def test_noise_seldom_fails_a_latency_at_its_limit() -> None:
    """The true ratio is the limit itself; a busy machine's noise is independent from pair to pair."""
    rng = np.random.default_rng(0)
    noisy = [np.exp(rng.normal(0, 0.4, 7)).tolist() for _ in range(2000)]
    failed = np.mean([of_times(ours, [1.0] * 7).exceeds(1.0) is True for ours in noisy])
    assert 0 < failed < 0.5**7 + 4 * np.sqrt(0.5**7 / 2000)
