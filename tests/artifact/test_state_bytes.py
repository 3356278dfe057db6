"""The bytes of states against the arrays of a runner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.artifact.state_bytes import state_bytes
from h1export.commands.load import load_runner


@pytest.mark.ort
@pytest.mark.parametrize("kv", ["fp16", "int8", "fp32"])
def test_they_are_those_of_the_arrays(kv: str, tiny: Path, build: Callable[..., Artifact]) -> None:
    artifact = build(tiny, "int4", kv=kv)
    runner: Any = load_runner(artifact, kernels="stock")
    for tokens in (1, 9):
        _, states = runner.step(np.ones((2, tokens), np.int64), np.ones((2, tokens), np.int64), runner.initial(2))
        expected = sum(array.nbytes for array in states.values())
        assert state_bytes(artifact.manifest, artifact.config, tokens, batch=2) == expected
