"""Prequantized GPTQ checkpoints in a network for TensorRT: sorted columns are gathered, and zero points are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gptq_files import Written

from h1export.artifact.artifact import Artifact
from h1export.commands.build import build_artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.quantize.scheme import QuantScheme
from h1export.targets.tensorrt.options import TensorRTOptions
from h1export.validate.accuracy.logits import relative_error

IDS = np.random.default_rng(0).integers(0, 264, 70, dtype=np.int64)


def made(written: Written, out: Path) -> Artifact:
    return build_artifact(
        written.folder,
        "trt",
        out,
        scheme=QuantScheme("none"),
        options=TensorRTOptions(max_context=128, runtime="tensorrt"),
    )


@pytest.mark.parametrize(
    ("layout", "group", "head"),
    [("gptq", 96, True), ("gptq", -1, False), ("awq", 32, False), ("compressed", 32, False)],
)
def test_the_network_computes_what_the_integers_mean(
    layout: str,
    group: int,
    head: bool,
    make_gptq: Callable[..., Written],
    gptq_logits: Callable[..., Any],
    without_plugin: None,
    tmp_path: Path,
) -> None:
    written = make_gptq(
        tmp_path / "in",
        layout=layout,
        act_order=layout != "awq",
        group=group,
        head=head,
        like={"self_attn.o_proj": "mamba.in_proj"},
    )
    artifact = made(written, tmp_path / "out")
    truth = gptq_logits(written, IDS)
    for float32, limit in ((True, 1e-5), (False, 5e-3)):
        runner = load_runner(artifact, float32=float32)
        logits, _ = runner.step(IDS[None], np.ones((1, len(IDS)), np.int64), runner.initial(1))
        assert relative_error(logits[0], truth) <= limit
    stored: Any = runner.stored_weights()
    assert set(stored) == set(written.codes)
    for name in written.codes:
        np.testing.assert_array_equal(stored[name], written.weight(name))


def test_zero_points_are_refused(make_gptq: Callable[..., Written], without_plugin: None, tmp_path: Path) -> None:
    written = make_gptq(tmp_path / "in", sym=False)
    with pytest.raises(
        H1ExportError,
        match="zero points of its own, and TensorRT takes symmetric integers only; use --target ort or coreml",
    ):
        made(written, tmp_path / "out")
    assert not (tmp_path / "out").exists()
