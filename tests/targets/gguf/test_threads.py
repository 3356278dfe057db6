"""What threads and forks may share of llama.cpp's runner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from threaded_runners import CHECKS

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner


@pytest.mark.parametrize("check", CHECKS)
def test_sharing(check: str, make_checkpoint: Callable[..., Path], build: Callable[..., Artifact]) -> None:
    CHECKS[check](load_runner(build(make_checkpoint(), target="gguf"), 1))
