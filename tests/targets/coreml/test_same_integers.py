"""Builds for several targets: every artifact has the same codes and scales, whatever the method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.model.falcon_h1.tensors import EMBEDDING


@pytest.mark.parametrize("method", ["rtn", "search", "awq", "gptq"])
def test_every_target_holds_the_same_integers(
    method: str, spoken_checkpoint: Path, build: Callable[..., Artifact], without_plugin: None
) -> None:
    made = (
        build(spoken_checkpoint, "int4", method=method),
        build(spoken_checkpoint, "int4", method=method, graph="portable"),
        build(spoken_checkpoint, "int4", method=method, target="coreml", max_context=192),
        build(spoken_checkpoint, "int4", method=method, target="trt", max_context=192, runtime="tensorrt"),
    )
    first, *others = (load_runner(artifact).stored_weights() for artifact in made)
    for other in others:
        assert set(first) - set(other) <= {EMBEDDING}  # Core ML stores an untied embedding in floats
        for name in other:
            # type: ignore[attr-defined]
            one = first.quantized(name)
            same = other.quantized(name)
            np.testing.assert_array_equal(one.codes, same.codes)
            np.testing.assert_array_equal(one.scales, same.scales)
