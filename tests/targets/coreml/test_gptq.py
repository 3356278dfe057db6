"""Prequantized GPTQ checkpoints in a Core ML package: zero points are offsets, and sorted columns are gathered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gptq_files import Written

from h1export.commands.build import build_artifact
from h1export.commands.load import load_runner
from h1export.quantize.scheme import QuantScheme
from h1export.targets.coreml.options import CoreMLOptions
from h1export.validate.accuracy.logits import relative_error

HALF = 3e-3  # of the range
IDS = np.random.default_rng(0).integers(0, 264, 70, dtype=np.int64)  # a prefill and decodes


HOWS: list[dict[str, Any]] = [
    {"sym": False, "act_order": True, "group": 96, "head": True, "like": {"self_attn.o_proj": "mamba.in_proj"}},
    {"bits": 8, "sym": False, "group": -1, "v2": True},
    {"layout": "awq", "sym": False},
    {"layout": "compressed", "act_order": True, "sym": False},
]


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_the_package_computes_what_the_integers_mean(
    how: dict[str, Any], make_gptq: Callable[..., Written], gptq_logits: Callable[..., Any], tmp_path: Path
) -> None:
    written = make_gptq(tmp_path / "in", **how)
    options = CoreMLOptions(max_context=128)
    runner = load_runner(
        build_artifact(written.folder, "coreml", tmp_path / "out", scheme=QuantScheme("none"), options=options)
    )
    logits, _ = runner.step(IDS[None], np.ones((1, len(IDS)), np.int64), runner.initial(1))
    assert relative_error(logits[0], gptq_logits(written, IDS)) <= HALF
    onnx = load_runner(build_artifact(written.folder, "ort", tmp_path / "onnx", scheme=QuantScheme("none")))
    ours: Any = runner.stored_weights()
    theirs: Any = onnx.stored_weights()
    assert set(ours) == set(theirs) == set(written.codes)
    for name in written.codes:
        np.testing.assert_array_equal(ours[name], written.weight(name))
        one = ours.quantized(name)
        same = theirs.quantized(name)
        np.testing.assert_array_equal(one.codes, same.codes)
        np.testing.assert_array_equal(one.scales, same.scales)
        np.testing.assert_array_equal(
            one.zeros if one.zeros is not None else 0, same.zeros if same.zeros is not None else 0
        )
