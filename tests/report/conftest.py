"""Artifacts with reports that hold every kind of row, made by hand: what a page is made of."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.model.falcon_h1.probes import probe_names
from h1export.model.falcon_h1.states import StateSpec
from h1export.report.histogram import Histogram
from h1export.report.report import KL, LOGIT_ERROR, Report, Row

Judge = Callable[..., Path]
ENVIRONMENT = {"machine": "x86_64", "system": "Linux", "python": "3.11", "packages": {"torch": "2.13.0"}}


def report_of(artifact: Artifact, size: float, hostile: str) -> Report:
    """Errors around ``size``; ``hostile`` is in every text that an artifact or a report could bring."""
    rng = np.random.default_rng(0)

    def case(check: str, against: str, scale: float, limit: float) -> Row:
        details = {tensor.key: scale * float(rng.uniform(0.5, 1)) for tensor in StateSpec.of(artifact.config).tensors}
        figures = {"logits": scale, "top1": 1.0, "kl": scale**2, "states": max(details.values())}
        errors = {LOGIT_ERROR: Histogram.of(scale * rng.uniform(0.01, 1, 200))}
        return Row(
            check,
            against,
            figures,
            limits={"logits": limit},
            note=f"worst state 0.key {hostile}",
            details=details,
            histograms=errors,
        )

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
    rows = (
        *(case(f"case {index}", "stored", size, 5e-5) for index in range(3)),
        *(case(f"case {index}", "drift", 1e-2, 0.08) for index in range(3)),
        *(
            case(f"context {length}", group, size * length, 5e-2)
            for length in (512, 2048)
            for group in ("stored", "drift")
        ),
        Row("bits per byte", "source", text, limits={"ratio": 1.05}, note="6000 bytes", details={}, histograms=spread),
        Row("greedy text", "source", {"tokens": 6.5, "never": 0.25}),
        *(
            Row(f"{kind} latency", "source", {"artifact_s": 0.1, "reference_s": 0.5, "ratio": 0.2})
            for kind in ("prefill", "decode")
        ),
        *(Row(f"cost at {n}", "source", {"prefill_ms": 0.5, "decode_ms": n / 1000}) for n in (512, 2048)),
        *(
            Row(f"bisect {phase}", "stored", {"error": size}, limits={"error": 5e-5}, details=deep)
            for phase in ("prefill", "decode")
        ),
        Row(
            "fp16 range",
            hostile,
            {"largest": 123456.0, "share": float("inf") if size > 1 else 0.5},
            limits={"share": 1.0},
        ),
        Row("padded batch", "stored", note=hostile),
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
