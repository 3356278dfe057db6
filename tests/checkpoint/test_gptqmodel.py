"""What GPTQModel wrote: every integer and every value is the one that its own kernel makes of the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from packed_by_gptqmodel import KINDS, Truth, truth_of

from h1export.checkpoint.store import WeightStore
from h1export.model.falcon_h1.config import FalconH1Config


def test_the_recorded_kinds() -> None:
    """Those that issue reports name, the other checkpoint_format, and a scale a row."""
    found = set()
    for folder in KINDS:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        found.add(tuple(config[key] for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format")))
    assert {(4, 128, True, False, "gptq"), (4, 32, False, True, "gptq"), (8, 32, True, False, "gptq")} <= found
    assert {(8, 32, False, False, "gptq_v2"), (4, -1, False, False, "gptq")} <= found


@pytest.mark.parametrize("folder", KINDS, ids=lambda folder: folder.name)
def test_integers_and_values_are_gptqmodels(folder: Path) -> None:
    truth = truth_of(folder)
    store = WeightStore.open(folder, FalconH1Config.load(folder))
    assert set(store.packed) == set(truth)
    assert any(matrix.shape[0] % 8 for matrix in store.packed.values())  # the last word of zero points is not full
    for name, matrix in store.packed.items():
        rows = matrix.shape[0]
        middle = matrix.packed_format.middle
        found = Truth.of(
            dense=matrix.dense(0, rows),
            codes=matrix.codes(0, rows).astype(int) + middle,
            zeros=matrix.zeros(0, rows).astype(int) + middle,
        )
        assert found == truth[name], name
