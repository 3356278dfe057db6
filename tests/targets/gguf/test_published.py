"""Random models of the published sizes and switches, of which layers and vocabulary are cut, in llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BASE
from published_configs import PUBLISHED

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner

EXACT = 1e-5  # of the range
CUT = {"num_hidden_layers": 1, "vocab_size": 512}
SAME = {True: {"head": "q4_0"}, False: {"head": "q4_0", "embedding": "q8_0"}}  # tied -> the types of an int4 build


@pytest.mark.parametrize(
    ("name", "changed"),
    [*((name, False) for name in PUBLISHED), ("Falcon-H1-Tiny-90M-Base", True)],
    ids=[*PUBLISHED, "untied and without a bias of the convolution"],
)
def test_published_shapes_are_exact_and_have_the_same_codes(
    name: str,
    changed: bool,
    make_checkpoint: Callable[..., Path],
    build: Callable[..., Artifact],
    worst: Callable[..., tuple[float, float]],
) -> None:
    """F32 against transformers, int4 dequantised against transformers on the same weights, prefill and decode."""
    config = {key: value for key, value in PUBLISHED[name].items() if key in BASE} | CUT
    tied = config["tie_word_embeddings"] != changed
    changes = {"tie_word_embeddings": tied, "mamba_conv_bias": False} if changed else {}
    checkpoint = make_checkpoint(**config | changes)
    assert max(worst(build(checkpoint, "none", target="gguf"), checkpoint)) <= EXACT
    integers = build(checkpoint, "int4", target="gguf", **SAME[tied])
    assert max(worst(integers, checkpoint)) <= EXACT
    mine: Any = load_runner(integers, 1).stored_weights()
    theirs: Any = load_runner(build(checkpoint, "int4"), kernels="stock").stored_weights()
    assert set(mine) == set(theirs)
    for weight in theirs:
        assert np.array_equal(mine.quantized(weight).codes, theirs.quantized(weight).codes), weight
