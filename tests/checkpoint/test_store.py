"""WeightStore reads exactly what the safetensors library reads, in blocks of any size, from any sharding."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import FalconH1ForCausalLM

from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import tensor_shapes
from h1export.progress import SILENT

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
Tensors = dict[str, torch.Tensor]


def bits(array: np.ndarray) -> np.ndarray:
    """Return the bits of float32 values, so that NaNs and signed zeros are compared."""
    return array.view(np.uint32)


def same_as_the_library(store: WeightStore, tensors: Mapping[str, torch.Tensor]) -> None:
    assert {entry.name for entry in store.entries} == tensors.keys()
    for name, tensor in tensors.items():
        found = np.concatenate(list(store.blocks(name, 1 << 14)))
        assert found.dtype == np.float32
        assert found.shape == tuple(tensor.shape)
        assert np.array_equal(bits(found), bits(tensor.float().numpy())), name


def folder_of(tensors: Tensors, config_from: Path, folder: Path, *, shard: str = "1GB") -> Path:
    """Write a checkpoint of ``tensors`` as transformers would save it."""
    folder.mkdir()
    shutil.copyfile(config_from / "config.json", folder / "config.json")
    save_torch_state_dict(tensors, folder, max_shard_size=shard, safe_serialization=True)
    return folder


def opened(folder: Path) -> WeightStore:
    return WeightStore.open(folder, FalconH1Config.load(folder))


@pytest.fixture(scope="module")
def plain(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("plain", num_hidden_layers=1)


@pytest.fixture(scope="module")
def tensors(plain: Path) -> Tensors:
    """The tensors of the plain bf16 checkpoint as the library reads them."""
    return load_file(plain / "model.safetensors")


def test_every_random_checkpoint_reads_like_the_library(checkpoint: Path) -> None:
    same_as_the_library(opened(checkpoint), load_file(checkpoint / "model.safetensors"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_value_of_a_dtype_survives(dtype: torch.dtype, plain: Path, tensors: Tensors, tmp_path: Path) -> None:
    """The embedding is filled with random bit patterns: subnormals, infinities, NaNs and signed zeros among them."""
    width = {torch.float32: np.int32}.get(dtype, np.int16)
    shape = tuple(tensors[EMBEDDING].shape)
    info = np.iinfo(width)
    patterns = torch.from_numpy(np.random.default_rng(7).integers(info.min, info.max, shape, width, endpoint=True))
    changed = {name: tensor.to(dtype) for name, tensor in tensors.items()} | {EMBEDDING: patterns.view(dtype)}
    store = opened(folder_of(changed, plain, tmp_path / "made"))
    found = store.rows(EMBEDDING, 0, shape[0])
    expected = changed[EMBEDDING].float().numpy()
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    assert np.array_equal(bits(found)[~np.isnan(found)], bits(expected)[~np.isnan(expected)])
    assert not np.isfinite(expected).all()
    same_as_the_library(store, changed | {EMBEDDING: torch.from_numpy(found)})


def test_shards_by_transformers_read_like_the_single_file(plain: Path, tensors: Tensors, tmp_path: Path) -> None:
    FalconH1ForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="150KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert (tmp_path / "model.safetensors.index.json").is_file()
    store = opened(tmp_path)
    same_as_the_library(store, tensors)
    assert store.fingerprint() == opened(plain).fingerprint()


def test_data_at_an_odd_offset(
    plain: Path,
    tensors: Tensors,
    tmp_path: Path,
    write_safetensors: Callable[..., Path],
    read_safetensors: Callable[..., Any],
) -> None:
    """The format recommends alignment and does not demand it."""
    header, data = read_safetensors(plain / "model.safetensors")
    shutil.copyfile(plain / "config.json", tmp_path / "config.json")
    remainders = set()
    for pad in range(4):
        write_safetensors(tmp_path / "model.safetensors", header | {"__metadata__": {"pad": "x" * pad}}, data)
        store = opened(tmp_path)
        same_as_the_library(store, tensors)
        remainders.add(min(entry.start for entry in store.entries) % 4)
    assert remainders == {0, 1, 2, 3}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    name=st.sampled_from([EMBEDDING, "model.layers.0.mamba.conv1d.weight", "model.layers.0.mamba.A_log"]),
    data=st.data(),
)
def test_rows_are_the_rows(plain: Path, tensors: Tensors, name: str, data: st.DataObject) -> None:
    whole = tensors[name].float().numpy()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert np.array_equal(opened(plain).rows(name, start, stop), whole[start:stop])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    name=st.sampled_from([EMBEDDING, "model.layers.0.mamba.conv1d.weight", "model.layers.0.mamba.A_log"]),
    budget=st.integers(0, 1 << 18),
)
def test_blocks_of_any_size_make_the_tensor(plain: Path, tensors: Tensors, name: str, budget: int) -> None:
    """A block has as many whole rows as the limit holds, and at least one."""
    whole = tensors[name].float().numpy()
    blocks = list(opened(plain).blocks(name, budget))
    assert np.array_equal(np.concatenate(blocks), whole)
    fit = max(1, budget // whole[0].nbytes)
    assert [len(block) for block in blocks[:-1]] == [min(fit, len(whole))] * (len(blocks) - 1)
    assert 1 <= len(blocks[-1]) <= fit


def test_a_block_may_be_changed_without_changing_the_checkpoint(plain: Path, tensors: Tensors) -> None:
    store = opened(plain)
    before = (plain / "model.safetensors").read_bytes()
    store.rows(EMBEDDING, 0, 10)[:] = 7.0
    assert np.array_equal(store.rows(EMBEDDING, 0, 10), tensors[EMBEDDING][:10].float().numpy())
    assert (plain / "model.safetensors").read_bytes() == before


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    """A sparse file that claims more than 16 GiB opens at once, and gives its last rows."""
    sizes = {"hidden_size": 1 << 14, "vocab_size": 1 << 18, "intermediate_size": 1 << 16, "num_hidden_layers": 1}
    config = FalconH1Config.from_config({"model_type": "falcon_h1", **sizes})
    header = {}
    end = 0
    for name, shape in tensor_shapes(config).items():
        start = end
        end = end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    assert end > 1 << 34
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    assert not WeightStore.open(tmp_path, config).rows(HEAD, (1 << 18) - 2, 1 << 18).any()


def test_the_fingerprint_knows_no_sharding_order_or_metadata(plain: Path, tensors: Tensors, tmp_path: Path) -> None:
    fingerprint = opened(plain).fingerprint()
    assert len(fingerprint) == 64
    for count, shard in enumerate(["1GB", "150KB", "40KB"]):
        assert opened(folder_of(tensors, plain, tmp_path / str(count), shard=shard)).fingerprint() == fingerprint
    backwards = folder_of({}, plain, tmp_path / "backwards")
    for file in backwards.glob("*.safetensors*"):
        file.unlink()
    names = sorted(tensors)
    for part, chosen in enumerate([names[1::2], names[0::2]]):
        save_file(
            {name: tensors[name] for name in reversed(chosen)}, backwards / f"{part}.safetensors", {"note": str(part)}
        )
    (backwards / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "1.safetensors", "b": "0.safetensors"}}', encoding="utf-8"
    )
    assert opened(backwards).fingerprint() == fingerprint


@settings(max_examples=25, deadline=None, derandomize=True)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_the_fingerprint_sees_one_bit(
    plain: Path, tmp_path_factory: pytest.TempPathFactory, place: float, bit: int
) -> None:
    store = opened(plain)
    content = bytearray((plain / "model.safetensors").read_bytes())
    base = min(entry.start for entry in store.entries)
    content[base + int(place * (len(content) - base))] ^= 1 << bit
    folder = tmp_path_factory.mktemp("flipped")
    (folder / "model.safetensors").write_bytes(content)
    assert WeightStore.open(folder, FalconH1Config.load(plain)).fingerprint() != store.fingerprint()


def test_the_fingerprint_sees_names_and_dtypes(plain: Path, tensors: Tensors, tmp_path: Path) -> None:
    k = "model.layers.0.self_attn.k_proj.weight"
    v = "model.layers.0.self_attn.v_proj.weight"
    swapped = folder_of(tensors | {k: tensors[v], v: tensors[k]}, plain, tmp_path / "swapped")
    relabelled = folder_of(
        {name: tensor.view(torch.float16) for name, tensor in tensors.items()}, plain, tmp_path / "relabelled"
    )
    assert len({opened(folder).fingerprint() for folder in (plain, swapped, relabelled)}) == 3


@pytest.mark.parametrize("end", [0, -1])
def test_the_fingerprint_sees_both_ends_of_every_tensor(end: int, plain: Path, tmp_path: Path) -> None:
    config = FalconH1Config.load(plain)
    whole = (plain / "model.safetensors").read_bytes()
    store = WeightStore.open(plain, config)
    seen = {store.fingerprint()}
    for entry in store.entries:
        content = bytearray(whole)
        content[entry.start + (end % entry.nbytes)] ^= 1
        (tmp_path / "model.safetensors").write_bytes(content)
        seen.add(WeightStore.open(tmp_path, config).fingerprint())
    assert len(seen) == 1 + len(store.entries)


def test_the_fingerprint_sees_names_that_do_not_change_the_order(plain: Path) -> None:
    store = opened(plain)
    renamed = WeightStore({f"{entry.name}_": entry for entry in store.entries}, SILENT)
    assert renamed.fingerprint() != store.fingerprint()


@pytest.fixture(scope="module")
def tied(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("tied", num_hidden_layers=1)


def test_a_tied_checkpoint_needs_no_head(tied: Path) -> None:
    assert HEAD not in {entry.name for entry in opened(tied).entries}


def test_a_tied_checkpoint_may_store_its_embedding_twice(tied: Path, tmp_path: Path) -> None:
    stored = load_file(tied / "model.safetensors")
    save_file(stored | {HEAD: stored[EMBEDDING].clone()}, tmp_path / "model.safetensors")
    same_as_the_library(
        WeightStore.open(tmp_path, FalconH1Config.load(tied)), load_file(tmp_path / "model.safetensors")
    )


def nudged(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` with the last bit of its last element flipped."""
    changed = tensor.clone().view(torch.int16)
    changed[-1, -1] ^= 1
    return changed.view(tensor.dtype)


@pytest.mark.parametrize(
    "change", [nudged, torch.zeros_like, lambda tensor: tensor[1:], lambda tensor: tensor.T.contiguous()]
)
def test_a_tied_checkpoint_may_not_store_another_head(
    change: Callable[[torch.Tensor], torch.Tensor], tied: Path, tmp_path: Path
) -> None:
    stored = load_file(tied / "model.safetensors")
    save_file(stored | {HEAD: change(stored[EMBEDDING]).clone()}, tmp_path / "model.safetensors")
    with pytest.raises(
        H1ExportError, match=r'model\.safetensors: tensor "lm_head\.weight": .*; config.json and the weights belong'
    ):
        WeightStore.open(tmp_path, FalconH1Config.load(tied))
