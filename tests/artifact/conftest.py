"""The artifact that these tests open, change and read."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from artifact_files import build

from h1export.artifact.artifact import Artifact
from h1export.model.falcon_h1.config import FalconH1Config


@pytest.fixture
def config(config_of: Callable[..., FalconH1Config]) -> FalconH1Config:
    """Its time_step_limit is infinite, which JSON has no number for."""
    config = config_of()
    assert math.isinf(config.time_step_limit[1])
    return config


@pytest.fixture
def artifact(tmp_path: Path, config: FalconH1Config) -> Artifact:
    return build(tmp_path / "out", config)
