"""Prequantized weights: the reader gives the codes, scales and zero points that the tests' own writer has stored."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gptq_files import Gptq, Tensors, Written, edit, write_tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.checkpoint.gptq_format import GptqFormat
from h1export.checkpoint.gptq_tensor import GptqMatrix
from h1export.checkpoint.safetensors_header import read_header
from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import EMBEDDING
from h1export.quantize.methods.prequantized import Prequantized, need_symmetric
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.precision import Precision
from h1export.quantize.source import QuantizedWeights, Rounded

NAME = "x.weight"
OUT_PROJ = "model.layers.0.mamba.out_proj"
IN_PROJ = "model.layers.0.mamba.in_proj"

HOWS = st.builds(
    Gptq,
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, 96, 128, -1]),
    sym=st.booleans(),
    v2=st.booleans(),
    act_order=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)


def opened(written: Written, how: Gptq, shape: tuple[int, int]) -> GptqMatrix:
    entries = {entry.name: entry for entry in read_header(written.folder / "model.safetensors")}
    return GptqMatrix.open(
        NAME, shape, GptqFormat(how.bits, how.group, how.sym, zero_offset=0 if how.v2 else 1), entries=entries
    )


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    HOWS, st.sampled_from([8, 24, 40]), st.sampled_from([32, 96, 128, 192, 256]), st.integers(0, 23), st.integers(1, 24)
)
def test_every_value_is_the_writers(how: Gptq, rows: int, columns: int, start: int, count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = write_tensors(
            {NAME: np.random.default_rng(how.seed).standard_normal((rows, columns))}, Path(folder), how
        )
        matrix = opened(written, how, (rows, columns))
        middle = 1 << (how.bits - 1)
        stop = min(start + count, rows)
        start = min(start, stop - 1)
        np.testing.assert_array_equal(matrix.codes(start, stop).astype(int) + middle, written.codes[NAME][start:stop])
        np.testing.assert_array_equal(matrix.zeros(start, stop).astype(int) + middle, written.zeros[NAME][start:stop])
        np.testing.assert_array_equal(matrix.scales(start, stop), written.scales[NAME][start:stop])
        np.testing.assert_array_equal(matrix.dense(start, stop), written.weight(NAME)[start:stop])
        assert bool(matrix.order_name) == (not np.array_equal(written.g_idx[NAME], np.sort(written.g_idx[NAME])))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_zero_point_of_zero_borrows_from_its_neighbour(bits: int, tmp_path: Path) -> None:
    how = Gptq(bits=bits, sym=False, seed=2)
    written = write_tensors({NAME: np.random.default_rng(0).standard_normal((64, 64))}, tmp_path, how)
    assert (written.zeros[NAME] == 0).any()
    found = opened(written, how, (64, 64)).zeros(0, 64)
    np.testing.assert_array_equal(found.astype(int) + (1 << (bits - 1)), written.zeros[NAME])


FAULTS: dict[str, Callable[[Tensors], None]] = {
    "zero points off by one": lambda t: t.update({"x.qzeros": t["x.qzeros"] + np.int32(0x11111111)}),
    "nibbles swapped": lambda t: t.update(
        {"x.qweight": (t["x.qweight"] >> 4 & 0x0F0F0F0F) | ((t["x.qweight"] & 0x0F0F0F0F) << 4)}
    ),
    "g_idx ignored": lambda t: t.update({"x.g_idx": np.arange(128, dtype=np.int32) // 32}),
    "scales of another group": lambda t: t.update({"x.scales": t["x.scales"][::-1]}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_show(fault: str, tmp_path: Path) -> None:
    """A reader that made this mistake would read other values than those that were written."""
    how = Gptq(sym=False, act_order=True)
    written = write_tensors({NAME: np.random.default_rng(0).standard_normal((16, 128))}, tmp_path, how)
    edit(tmp_path, FAULTS[fault])
    assert np.abs(opened(written, how, (16, 128)).dense(0, 16) - written.weight(NAME)).max() > 0.01


@pytest.fixture
def folder(make_gptq: Callable[..., Written], tmp_path: Path) -> Path:
    """A valid checkpoint, symmetric and with its columns in order, for tests to damage."""
    return make_gptq(tmp_path).folder


def open_store(folder: Path) -> WeightStore:
    return WeightStore.open(folder, FalconH1Config.load(folder))


def refused(folder: Path, *mentioned: str) -> None:
    with pytest.raises(H1ExportError) as caught:
        open_store(folder)
    check(caught.value, folder, *mentioned)


def check(error: H1ExportError, folder: Path, *mentioned: str) -> None:
    assert str(error).startswith(str(folder)), error
    assert all(text in str(error) for text in mentioned), error
    assert error.next_step


def test_every_tensor_is_claimed(folder: Path) -> None:
    store = open_store(folder)
    assert len(store.packed) == 9 * FalconH1Config.load(folder).num_hidden_layers
    assert store.shape(f"{OUT_PROJ}.weight") == (128, 256)
    assert sum(1 for _ in store.row_ranges([f"{OUT_PROJ}.weight"], 4 * 256 * 10)) == 13


@pytest.mark.parametrize("part", ["qzeros", "scales", "g_idx"])
def test_a_part_is_missing(part: str, folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop(f"{OUT_PROJ}.{part}"))
    refused(folder, f"{OUT_PROJ}.{part}", "missing")


def test_both_are_missing(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop(f"{OUT_PROJ}.qweight"))
    refused(folder, f"{OUT_PROJ}.weight", "missing")


HOSTILE: dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]] = {
    "shape": (lambda t: t.update({f"{OUT_PROJ}.qweight": t[f"{OUT_PROJ}.qweight"][1:]}), ("qweight", "shape")),
    "groups": (lambda t: t.update({f"{OUT_PROJ}.scales": t[f"{OUT_PROJ}.scales"][1:]}), ("scales", "shape")),
    "float codes": (
        lambda t: t.update({f"{OUT_PROJ}.qweight": t[f"{OUT_PROJ}.qweight"].view(np.float32)}),
        ("qweight", "'F32'", "I32"),
    ),
    "integer scales": (
        lambda t: t.update({f"{OUT_PROJ}.scales": t[f"{OUT_PROJ}.scales"].astype(np.int32)}),
        ("scales", "'I32'"),
    ),
    "group too large": (lambda t: t[f"{OUT_PROJ}.g_idx"].put(3, 8), ("g_idx", "from 0 to 8", "there are 8")),
    "group below zero": (lambda t: t[f"{OUT_PROJ}.g_idx"].put(3, -1), ("g_idx", "from -1")),
    "twice": (
        lambda t: t.update({f"{OUT_PROJ}.weight": np.zeros((128, 256), np.float32)}),
        (f"{OUT_PROJ}.weight", "integers too"),
    ),
    "unclaimed": (lambda t: t.update({"x.qweight": np.zeros((4, 8), np.int32)}), ("x.qweight", "no place")),
    "a packed embedding": (
        lambda t: t.update({"model.embed_tokens.qweight": np.zeros((4, 8), np.int32)}),
        ("embed_tokens.qweight",),
    ),
    "an integer norm": (
        lambda t: t.update({"model.final_layernorm.weight": np.ones(128, np.int32)}),
        ("final_layernorm", "'I32'", "F32, F16, BF16"),
    ),
    "a bias that the architecture lacks": (
        lambda t: t.update({f"{OUT_PROJ}.bias": np.ones(128, np.float16)}),
        (f"{OUT_PROJ}.bias", "no place"),
    ),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_damaged_checkpoint(fault: str, folder: Path) -> None:
    change, mentioned = HOSTILE[fault]
    edit(folder, change)
    refused(folder, *mentioned)


def test_a_bias_of_zeros_says_nothing(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({f"{OUT_PROJ}.bias": np.zeros(128, np.float16)}))
    open_store(folder)


def rewrite_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def test_integers_that_config_json_does_not_speak_of(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "mamba.in_proj.weight", "integers", "quantize_config.json", "quantization_config")


def test_config_json_speaks_of_integers_that_are_not_there(copy_checkpoint: Callable[..., Path]) -> None:
    folder = copy_checkpoint("plain")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    refused(folder, "config.json", "no tensor is stored in integers")


def test_zero_points_that_config_json_contradicts(folder: Path) -> None:
    rewrite_config(folder, checkpoint_format="gptq_v2")
    with pytest.raises(H1ExportError) as caught:
        open_store(folder).rows(f"{OUT_PROJ}.weight", 0, 8)
    check(caught.value, folder, "qzeros", "[7]", "8", "checkpoint_format")


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_scales_that_mean_no_weight(scale: float, folder: Path) -> None:
    edit(folder, lambda tensors: tensors[f"{OUT_PROJ}.scales"].put(5, scale))
    store = open_store(folder)
    with pytest.raises(H1ExportError) as caught:
        store.rows(f"{OUT_PROJ}.weight", 0, 8)
    check(caught.value, folder, "scales", "positive and finite")


@pytest.mark.parametrize("scale", [1e-9, 1 / 3, 1e6])
def test_float32_scales_that_float16_does_not_have(scale: float, folder: Path) -> None:
    name = f"{OUT_PROJ}.scales"
    edit(folder, lambda tensors: tensors.update({name: tensors[name].astype(np.float32)}))
    open_store(folder).rows(f"{OUT_PROJ}.weight", 0, 8)  # those of float16 are exact
    edit(folder, lambda tensors: tensors[name].put(5, scale))
    with pytest.raises(H1ExportError) as caught:
        open_store(folder).rows(f"{OUT_PROJ}.weight", 0, 8)
    check(caught.value, folder, "scales", "F32", "float16")


def prequantized(store: WeightStore) -> Prequantized:
    return Prequantized.of(store, Rounded(store, {EMBEDDING: Precision(8, 0)}, quantize_rows))


@pytest.mark.parametrize(
    ("how", "precision"),
    [
        ({}, Precision(4, 32)),
        ({"group": 96, "bits": 8}, Precision(8, 32)),
        ({"group": 64, "sym": False}, Precision(4, 64, True)),
        ({"group": 256}, Precision(4, 128)),
        ({"group": -1}, Precision(4, 128)),
        ({"group": -1, "bits": 8}, Precision(8, 0)),
    ],
    ids=str,
)
def test_groups_are_cut_into_blocks_that_runtimes_have(
    how: dict[str, Any], precision: Precision, make_gptq: Callable[..., Written], tmp_path: Path
) -> None:
    store = open_store(make_gptq(tmp_path, act_order=True, **how).folder)
    integers = prequantized(store)
    assert integers.precisions[f"{OUT_PROJ}.weight"] == precision
    assert integers.precisions[EMBEDDING] == Precision(8, 0)
    for name, matrix in store.packed.items():
        found = integers.rows(name, 8, 24)
        np.testing.assert_array_equal(found.unfolded(matrix.order), matrix.dense(8, 24))
        assert (found.zeros is None) == how.get("sym", True)


@pytest.mark.parametrize("group", [16, 48, 80])
def test_groups_that_no_block_divides(group: int, make_gptq: Callable[..., Written], tmp_path: Path) -> None:
    store = open_store(make_gptq(tmp_path, group=group).folder)
    with pytest.raises(H1ExportError, match=rf"groups of .*{group} columns.*multiple of 32"):
        prequantized(store)


def test_a_runtime_without_zero_points(make_gptq: Callable[..., Written], tmp_path: Path) -> None:
    symmetric: QuantizedWeights = prequantized(open_store(make_gptq(tmp_path / "a").folder))
    need_symmetric(symmetric, "TensorRT", next_step="give another")
    zero_points = prequantized(open_store(make_gptq(tmp_path / "b", sym=False).folder))
    with pytest.raises(H1ExportError, match=r"zero points.*TensorRT.*; give another"):
        need_symmetric(zero_points, "TensorRT", next_step="give another")


def test_the_fingerprint_says_what_the_integers_mean(folder: Path) -> None:
    before = open_store(folder).fingerprint()
    rewrite_config(folder, damp_percent=0.9)
    assert open_store(folder).fingerprint() == before
    rewrite_config(folder, checkpoint_format="gptq_v2")
    assert open_store(folder).fingerprint() != before
