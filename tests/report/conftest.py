"""Artifacts whose reports hold every kind of row, made by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.model.falcon_h1.probes import probe_names
from h1export.model.falcon_h1.states import StateSpec
from h1export.report.checks import CheckKind, Comparison, Phase
from h1export.report.histogram import Histogram
from h1export.report.report import KL, LOGIT_ERROR, Report, Row

Judge = Callable[..., Path]
ENVIRONMENT = {"machine": "x86_64", "system": "Linux", "python": "3.11", "packages": {"torch": "2.13.0"}}


def report_of(artifact: Artifact, size: float, hostile: str) -> Report:
    """Return a report of errors around ``size``; ``hostile`` is in every text that an artifact or a report may hold."""
    rng = np.random.default_rng(0)

    def compared(kind: CheckKind, comparison: Comparison, scale: float, *, tolerance: float, **named: Any) -> Row:
        details = {tensor.key: scale * float(rng.uniform(0.5, 1)) for tensor in StateSpec.of(artifact.config).tensors}
        return Row(
            kind,
            comparison,
            figures={"logits": scale, "top1": 1.0, "kl": scale**2, "states": max(details.values())},
            tolerances={"logits": tolerance},
            note=f"worst state 0.key {hostile}",
            details=details,
            histograms={LOGIT_ERROR: Histogram.of(scale * rng.uniform(0.01, 1, 200))},
            **named,
        )

    def single(kind: CheckKind, figures: dict[str, float], **others: Any) -> Row:
        return Row(kind, Comparison.SOURCE, figures=figures, **others)

    text = {
        "artifact": 1.3851,
        "reference": 1.3756,
        "ratio": 1.0069,
        "kl": 0.0104,
        "kl_p99": 0.08,
        "top1": 0.93,
        "top5": 0.94,
    }
    spread = {KL: Histogram.of(rng.exponential(0.01, 500)), LOGIT_ERROR: Histogram.of(rng.uniform(0, 0.1, 500))}
    places = [name for name in probe_names(artifact.config.num_hidden_layers) if "residual" not in name]
    outputs = [f"{layer}.output" for layer in range(artifact.config.num_hidden_layers)]
    deep = {place: size * float(rng.uniform(0.1, 1)) for place in ["embedding", *places, *outputs, "logits"]}
    largest = {"largest": 123456.0, "share": float("inf") if size > 1 else 0.5}
    rows = (
        *(compared(CheckKind.CASE, Comparison.STORED, size, tolerance=5e-5, case=f"case {i}") for i in range(3)),
        *(compared(CheckKind.CASE, Comparison.DRIFT, 1e-2, tolerance=0.08, case=f"case {i}") for i in range(3)),
        *(
            compared(CheckKind.CONTEXT, comparison, size * length, tolerance=5e-2, length=length)
            for length in (512, 2048)
            for comparison in (Comparison.STORED, Comparison.DRIFT)
        ),
        single(CheckKind.TEXT, text, tolerances={"ratio": 1.05}, note="6000 bytes", histograms=spread),
        single(CheckKind.GREEDY_TEXT, {"tokens": 6.5, "never": 0.25}),
        *(
            single(CheckKind.LATENCY, {"artifact_s": 0.1, "reference_s": 0.5, "ratio": ratio}, phase=phase)
            for phase, ratio in ((Phase.PREFILL, 0.2), (Phase.DECODE, 0.3))
        ),
        *(
            Row(
                CheckKind.CONTEXT_COST,
                Comparison.ALONE,
                length=length,
                figures={"prefill_ms": 0.5, "decode_ms": length / 1000},
            )
            for length in (512, 2048)
        ),
        *(
            Row(
                CheckKind.BISECT,
                Comparison.STORED,
                phase=phase,
                figures={"error": size},
                tolerances={"error": 5e-5},
                details=deep,
            )
            for phase in Phase
        ),
        single(CheckKind.STORED_INTEGERS, {"steps": 0.5}, tolerances={"steps": 0.51}),
        single(CheckKind.BISECT_INTEGERS, {"steps": 0.5}, tolerances={"steps": 0.51}),
        Row(CheckKind.FP16_RANGE, Comparison.FP16_LIMIT, figures=largest, tolerances={"share": 1.0}, note=hostile),
        Row(CheckKind.LOADING, Comparison.GOLDEN, device=f"ALL {hostile}"),
        Row(CheckKind.CASE, Comparison.STORED, case=f"padded batch {hostile}", note=hostile),
    )
    subject = {"kernels": f"h1export {hostile}", "notes": [hostile]}
    return Report(subject, ENVIRONMENT, rows)


@pytest.fixture(scope="session")
def judged(
    make_checkpoint: Callable[..., Path], build: Callable[..., Artifact], tmp_path_factory: pytest.TempPathFactory
) -> Judge:
    """judged("name", size=1e-6) -> the folder of an int4 artifact of this name, validated by hand."""

    def make(name: str, size: float = 1e-6, hostile: str = "") -> Path:
        artifact = build(make_checkpoint(), "int4")
        folder = Path(shutil.copytree(artifact.folder, tmp_path_factory.mktemp("judged") / name))
        (folder / "report.json").write_text(report_of(artifact, size, hostile).to_json(), encoding="utf-8")
        return folder

    return make
