"""Which file counts: folders with single files, indices and shards in every combination, against transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import FalconH1ForCausalLM

from h1export.checkpoint.shards import INDEX, SINGLE
from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config

NAME = "model.final_layernorm.weight"  # the tensor whose value tells the files apart
ONE = "model-00001-of-00002.safetensors"
TWO = "model-00002-of-00002.safetensors"
Tensors = dict[str, torch.Tensor]


def opened(folder: Path) -> WeightStore:
    return WeightStore.open(folder, FalconH1Config.load(folder))


@pytest.fixture(scope="module")
def small(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("plain", num_hidden_layers=1, hidden_size=64, vocab_size=32, intermediate_size=32)


@pytest.fixture(scope="module")
def tensors(small: Path) -> Tensors:
    return load_file(small / SINGLE)


def marked(tensors: Tensors, value: float) -> Tensors:
    return tensors | {NAME: torch.full_like(tensors[NAME], value)}


def folder_of(place: Path, small: Path, files: dict[str, Tensors], weight_map: dict[str, str] | None) -> Path:
    place.mkdir(exist_ok=True)
    shutil.copyfile(small / "config.json", place / "config.json")
    for name, held in files.items():
        save_file({key: value.clone() for key, value in held.items()}, place / name, {"format": "pt"})
    if weight_map is not None:
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
        (place / INDEX).write_text(text, encoding="utf-8")
    return place


def transformers_value(folder: Path) -> float:
    model: Any = FalconH1ForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return float(model.state_dict()[NAME][0])


LAYOUTS = st.fixed_dictionaries(
    {
        "single": st.sampled_from([None, 2.0, 3.0]),
        "one": st.sampled_from([None, 2.0, 3.0]),
        "two": st.sampled_from([None, 2.0, 3.0]),
        "extra": st.sampled_from([None, 9.0]),
        "mapped": st.sampled_from([ONE, TWO, "nothing", "no index"]),
    }
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(layout=LAYOUTS)
def test_what_is_read_is_what_transformers_reads(
    layout: dict[str, Any], small: Path, tensors: Tensors, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Both read the same value; or the rules that disagree are refused by the names of both files."""
    rest = {name: tensor for name, tensor in tensors.items() if name != NAME}
    held = {ONE: rest if layout["one"] is None else marked(rest | {NAME: tensors[NAME]}, layout["one"])}
    held[TWO] = {"model.unused": torch.zeros(1)}
    if layout["two"] is not None:
        held[TWO][NAME] = torch.full_like(tensors[NAME], layout["two"])
    files = dict(held) if layout["mapped"] != "no index" else {}
    weight_map = dict.fromkeys(rest, ONE) | {"model.embed_tokens.weight": ONE, "lm_head.weight": ONE}
    weight_map |= {NAME: layout["mapped"]} if layout["mapped"] in (ONE, TWO) else {}
    listed = [value for value, name in ((layout["one"], ONE), (layout["two"], TWO)) if name in weight_map.values()]
    if layout["single"] is not None:
        files[SINGLE] = marked(tensors, layout["single"])
    if layout["extra"] is not None:
        files["zz.safetensors"] = marked(tensors, layout["extra"])
    folder = folder_of(
        tmp_path_factory.mktemp("layout"), small, files, None if layout["mapped"] == "no index" else weight_map
    )
    indexed = [value for value in listed if value is not None] if layout["mapped"] != "no index" else []
    single = [] if layout["single"] is None else [layout["single"]]
    if not single and not indexed:
        with pytest.raises(H1ExportError, match=r"is missing|neither model.safetensors"):
            opened(folder)
    elif len({*indexed, *single}) > 1 and (not single or len(set(indexed)) == 1):
        with pytest.raises(H1ExportError, match="with other values; delete the one that is out of date") as caught:
            opened(folder)
        assert sum(name in str(caught.value) for name in (SINGLE, ONE, TWO)) >= 2
    else:
        assert opened(folder).rows(NAME, 0, 1)[0] == transformers_value(folder)


def test_shards_and_then_one_file(small: Path, tensors: Tensors, tmp_path: Path) -> None:
    """The file counts; shards that are left over are refused where they differ, and ignored where they do not."""
    index = dict.fromkeys(tensors, ONE)
    same = folder_of(tmp_path / "same", small, {ONE: tensors, SINGLE: tensors}, index)
    assert opened(same).fingerprint() == opened(small).fingerprint()
    assert {entry.file.name for entry in opened(same).entries} == {SINGLE}
    (same / ONE).unlink()
    assert opened(same).fingerprint() == opened(small).fingerprint()
    (same / INDEX).write_text("{", encoding="utf-8")
    assert opened(same).fingerprint() == opened(small).fingerprint()


def test_an_overlay_that_the_index_does_not_list_is_ignored(small: Path, tensors: Tensors, tmp_path: Path) -> None:
    """A listed shard may hold more than its part: unused names do not count."""
    more = tensors | {"adapter.weight": torch.zeros(3)}
    folder = folder_of(tmp_path / "made", small, {ONE: more}, dict.fromkeys(tensors, ONE))
    assert opened(folder).fingerprint() == opened(small).fingerprint()


def test_a_used_tensor_of_another_dtype_in_another_shard_is_refused(
    small: Path, tensors: Tensors, tmp_path: Path
) -> None:
    overlay = {NAME: tensors[NAME].float(), "lm_head.weight": tensors["lm_head.weight"]}
    index = dict.fromkeys(tensors, ONE) | {"lm_head.weight": TWO}
    folder = folder_of(tmp_path / "made", small, {ONE: tensors, TWO: overlay}, index)
    with pytest.raises(H1ExportError, match=f"{TWO}.*{NAME}.*{ONE} too"):
        opened(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_cache_of_links_reads_like_the_files(sharded: bool, small: Path, tensors: Tensors, tmp_path: Path) -> None:
    """The Hub client's layout: links to blobs that are named by their hash."""
    index = dict.fromkeys(tensors, ONE) if sharded else None
    real = folder_of(tmp_path / "real", small, {ONE if sharded else SINGLE: tensors}, index)
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(real.iterdir())):
        shutil.move(file, blobs / f"{number:064d}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064d}")
    store = opened(snapshot)
    assert store.fingerprint() == opened(small).fingerprint()
    assert np.array_equal(store.rows(NAME, 0, 4), opened(small).rows(NAME, 0, 4))
    for blob in blobs.iterdir():
        if blob.stat().st_size > 10_000:
            blob.unlink()
    with pytest.raises(H1ExportError, match=r"a link to a file that is not there|no such shard"):
        opened(snapshot)


def test_a_file_of_another_variant_is_named(small: Path, tensors: Tensors, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "made", small, {"model.fp16.safetensors": tensors}, None)
    with pytest.raises(H1ExportError, match=r"but model\.fp16\.safetensors; rename"):
        opened(folder)
