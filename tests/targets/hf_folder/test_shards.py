"""Shards of safetensors: what is written is read by the safetensors library, whatever the sizes and wherever a kill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from h1export.artifact.stage import Stage
from h1export.checkpoint.safetensors_header import read_header
from h1export.errors import H1ExportError
from h1export.targets.hf_folder.floats import rounded, unrounded
from h1export.targets.hf_folder.shards import Stored, TensorSpec, write_shards
from h1export.targets.hf_folder.words import packed, unpacked

INDEX = "model.safetensors.index.json"
NUMPY = {"F32": np.float32, "F16": np.float16, "I32": np.int32, "U32": np.uint32}


def arrays(count: int = 7) -> dict[str, Any]:
    """Tensors of every dtype and of odd sizes, so that unsorted ones would not be aligned."""
    rng = np.random.default_rng(0)
    kinds = list(NUMPY.values())
    return {f"t{i}": rng.integers(0, 99, (3, 2 * i + 1)).astype(kinds[i % len(kinds)]) for i in range(count)}


def stored(tensors: dict[str, Any], computed: list[str], fail_at: str = "") -> list[Stored]:
    """One Stored for each tensor, a row a block; computing ``fail_at`` raises."""
    names = {np.dtype(kind): name for name, kind in NUMPY.items()}

    def blocks(name: str) -> Iterator[Any]:
        for row in tensors[name]:
            yield lambda row=row: compute(name, row)

    def compute(name: str, row: Any) -> Any:
        if name == fail_at:
            raise KeyboardInterrupt
        computed.append(name)
        return (row[None],)

    return [
        Stored((TensorSpec(name, names[array.dtype], array.shape),), lambda name=name: blocks(name))
        for name, array in tensors.items()
    ]


@pytest.mark.parametrize("limit", [1, 60, 200, 10**9])
def test_shards_hold_the_tensors_and_the_index_finds_them(limit: int, tmp_path: Path) -> None:
    tensors = arrays()
    first = write_shards(Stage(tmp_path), stored(tensors, []), {"format": "pt"}, shard_bytes=limit)
    index = json.loads((tmp_path / INDEX).read_text())
    shards = sorted({*index["weight_map"].values()})
    assert first == shards[0]
    assert shards == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    found = {}
    for shard in shards:
        loaded = load_file(tmp_path / shard)
        assert {index["weight_map"][name] for name in loaded} == {shard}
        assert len(loaded) == 1 or sum(array.nbytes for array in loaded.values()) <= limit
        found |= loaded
        with safe_open(tmp_path / shard, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
        assert all(entry.start % np.dtype(NUMPY[entry.dtype]).itemsize == 0 for entry in read_header(tmp_path / shard))
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("limit", [60, 10**9])
@pytest.mark.parametrize("fail_at", [f"t{i}" for i in range(7)])
def test_a_killed_build_continues_where_it_stopped(fail_at: str, limit: int, tmp_path: Path) -> None:
    tensors = arrays()
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    write_shards(Stage(whole), stored(tensors, []), {}, shard_bytes=limit)
    before: list[str] = []
    after: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        write_shards(Stage(cut), stored(tensors, before, fail_at), {}, shard_bytes=limit)
    write_shards(Stage(cut), stored(tensors, after), {}, shard_bytes=limit)
    assert set(before).isdisjoint(after)
    assert {*before, *after} == tensors.keys()
    for file in whole.iterdir():
        if file.name != ".journal":
            assert file.read_bytes() == (cut / file.name).read_bytes()


def test_a_dry_stage_has_the_sizes_and_computes_nothing(tmp_path: Path) -> None:
    tensors = arrays()
    computed: list[str] = []
    for dry in (True, False):
        folder = tmp_path / str(dry)
        folder.mkdir()
        write_shards(Stage(folder, dry=dry), stored(tensors, computed), {}, shard_bytes=100)
        assert bool(computed) != dry
    sizes = [
        {file.name: file.stat().st_size for file in (tmp_path / str(dry)).iterdir() if file.name != ".journal"}
        for dry in (True, False)
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("bits", [4, 8])
@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=30)
def test_words_are_unpacked_to_the_codes(bits: int, data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    top = 1 << (bits - 1)
    seed = data.draw(st.integers(0, 99))
    codes = np.random.default_rng(seed).integers(-top, top, (shape[0], shape[1] * 32 // bits)).astype(np.int8)
    words = packed(codes, bits)
    assert words.shape == shape
    assert np.array_equal(unpacked(words, bits), codes)
    for place in range(32 // bits):  # the first code in the lowest bits
        assert int(words[0, 0]) >> (bits * place) & (2**bits - 1) == int(codes[0, place]) + top


@pytest.mark.parametrize(("dtype", "kind"), [("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_floats_are_rounded_to_nearest_and_never_to_infinity(dtype: str, kind: Any) -> None:
    values = np.random.default_rng(0).standard_normal((4, 5)) * 3
    assert np.array_equal(unrounded(rounded(values, dtype, tensor="x"), dtype), values.astype(kind).astype(np.float32))
    with pytest.raises(H1ExportError, match=f'tensor "x": holds values that {dtype} cannot hold'):
        rounded(np.array([1e39]), dtype, tensor="x")
