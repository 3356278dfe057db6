"""Tokens that begin, end and pad: generation_config.json before config.json, one or a list, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.special_tokens import GENERATION_CONFIG, SpecialTokens, special_tokens


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (None, SpecialTokens(1, (2,), 0)),
        ({}, SpecialTokens(1, (2,), 0)),
        ({"eos_token_id": None, "pad_token_id": None}, SpecialTokens(1, (2,), 0)),
        ({"eos_token_id": 7}, SpecialTokens(1, (7,), 0)),
        ({"eos_token_id": [7, 9], "bos_token_id": 3, "pad_token_id": 5}, SpecialTokens(3, (7, 9), 5)),
    ],
)
def test_the_file_comes_first(
    config: object, tokens: SpecialTokens, config_of: Callable[..., FalconH1Config], tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / GENERATION_CONFIG).write_text(json.dumps(config))
    assert special_tokens(tmp_path, config_of(bos_token_id=1, eos_token_id=2, pad_token_id=0)) == tokens


@pytest.mark.parametrize(
    "text",
    ["", "[", "[]", "7", '{"eos_token_id": "x"}', '{"eos_token_id": [1, -2]}', '{"pad_token_id": [1]}', "[" * 100_000],
)
def test_anything_else_is_refused(text: str, config_of: Callable[..., FalconH1Config], tmp_path: Path) -> None:
    (tmp_path / GENERATION_CONFIG).write_text(text)
    with pytest.raises(H1ExportError, match=GENERATION_CONFIG):
        special_tokens(tmp_path, config_of())
