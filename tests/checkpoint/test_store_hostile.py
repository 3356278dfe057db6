"""WeightStore refuses checkpoints that are incomplete, of another model, unsafe or damaged: one fault in each test."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
Tensors = dict[str, torch.Tensor]


def refused(folder: Path, *mentioned: str) -> None:
    """Assert that the error names the folder, the texts ``mentioned`` and a next step."""
    with pytest.raises(H1ExportError) as caught:
        WeightStore.open(folder, FalconH1Config.load(folder))
    message = str(caught.value)
    assert message.startswith(str(folder)), message
    assert len(message) <= 300 + len(str(folder))
    assert all(text in message for text in mentioned), message
    assert caught.value.next_step


@pytest.fixture
def plain(copy_checkpoint: Callable[..., Path]) -> Path:
    """A valid checkpoint in one file, for tests to damage."""
    return copy_checkpoint("plain")


@pytest.fixture
def change(plain: Path) -> Callable[[Callable[[Tensors], object]], Path]:
    """change(edit) -> the checkpoint's folder after ``edit`` has changed its tensors."""

    def apply(edit: Callable[[Tensors], object]) -> Path:
        tensors = load_file(plain / SINGLE)
        edit(tensors)
        save_file(tensors, plain / SINGLE)
        return plain

    return apply


@pytest.fixture
def sharded(plain: Path) -> Path:
    """The same checkpoint in shards."""
    tensors = load_file(plain / SINGLE)
    (plain / SINGLE).unlink()
    save_torch_state_dict(tensors, plain, max_shard_size="300KB", safe_serialization=True)
    assert len(shards(plain)) > 2
    return plain


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def write_index(folder: Path, value: object) -> None:
    """Write an index, and leave no single file, which would go before it."""
    if (folder / SINGLE).is_file():
        (folder / SINGLE).rename(folder / "part.safetensors")
    (folder / INDEX).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def test_the_sound_checkpoints_open(plain: Path) -> None:
    assert WeightStore.open(plain, FalconH1Config.load(plain)).entries


def test_the_sound_shards_open(sharded: Path) -> None:
    assert WeightStore.open(sharded, FalconH1Config.load(sharded)).entries


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.1.mamba.A_log",
        "model.layers.0.feed_forward.down_proj.weight",
    ],
)
def test_a_missing_weight(name: str, change: Callable[..., Path]) -> None:
    folder = change(lambda tensors: tensors.pop(name))
    refused(folder, f'tensor "{name}"', "is missing", "download the checkpoint again")


def test_every_missing_weight_is_found(plain: Path, edit_header: Callable[..., None]) -> None:
    """Each tensor in turn gets another name, and the error names the old one."""
    whole = (plain / SINGLE).read_bytes()
    names = [entry.name for entry in WeightStore.open(plain, FalconH1Config.load(plain)).entries]
    for name in names:
        (plain / SINGLE).write_bytes(whole)
        edit_header(plain / SINGLE, lambda header, name=name: header.update({f"{name}.renamed": header.pop(name)}))
        refused(plain, f'tensor "{name}"', "is missing")


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_norm.weight", "model.layers.0.freq", "model.layers.0.mamba.in_proj.bias"]
)
def test_a_weight_without_a_place(name: str, change: Callable[..., Path]) -> None:
    folder = change(lambda tensors: tensors.update({name: torch.zeros(4)}))
    refused(folder, SINGLE, f'tensor "{name}"', "no place in the architecture", "belong to different models")


def test_a_layer_too_many(change: Callable[..., Path]) -> None:
    extra = "model.layers.2."
    folder = change(
        lambda tensors: tensors.update({n.replace("model.layers.1.", extra): t.clone() for n, t in tensors.items()})
    )
    refused(folder, SINGLE, f'tensor "{extra}', "no place in the architecture")


def test_a_layer_too_few(plain: Path) -> None:
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    (plain / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}), encoding="utf-8")
    refused(plain, 'tensor "model.layers.2.', "is missing")


@pytest.mark.parametrize("edit", [lambda t: t[1:], lambda t: t.T, lambda t: t[None], lambda t: t.reshape(-1)])
def test_a_weight_of_another_shape(edit: Callable[[torch.Tensor], torch.Tensor], change: Callable[..., Path]) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    folder = change(lambda tensors: tensors.update({name: edit(tensors[name]).contiguous().clone()}))
    refused(folder, SINGLE, f'tensor "{name}"', "config.json asks for [64, 128]", "belong to different models")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_a_weight_of_another_dtype(dtype: torch.dtype, change: Callable[..., Path]) -> None:
    name = "model.layers.0.mamba.out_proj.weight"
    folder = change(lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(folder, SINGLE, f'tensor "{name}"', "dtype", "BF16")


def test_a_truncated_single_file(plain: Path) -> None:
    os.truncate(plain / SINGLE, (plain / SINGLE).stat().st_size - 1)
    refused(plain, SINGLE, 'tensor "', "truncated, download it again")


@pytest.mark.parametrize("which", [0, 1, -1])
@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_shard(which: int, keep: int, sharded: Path) -> None:
    """A shard is cut to ``keep`` bytes, or by one byte."""
    shard = shards(sharded)[which]
    os.truncate(shard, keep % shard.stat().st_size)
    refused(sharded, shard.name, "download it again")


def test_a_missing_shard(sharded: Path) -> None:
    shard = shards(sharded)[1]
    shard.unlink()
    refused(sharded, shard.name, "no such shard", INDEX, "download it again")


def test_a_shard_that_the_index_does_not_list(sharded: Path) -> None:
    """The error names a tensor of the missing shard."""
    index = json.loads((sharded / INDEX).read_text(encoding="utf-8"))
    gone = shards(sharded)[0].name
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard != gone}
    write_index(sharded, index)
    refused(sharded, 'tensor "', "is missing", "download the checkpoint again")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    one, two = shards(sharded)[:2]
    tensors = load_file(one)
    name = next(iter(tensors))
    save_file(load_file(two) | {name: tensors[name] + 1}, two)
    refused(sharded, two.name, f'tensor "{name}"', f"is in {one.name} too", "with other values", "out of date")


UNSAFE_NAMES = [
    "../outside.safetensors",
    "sub/inside.safetensors",
    "./model.safetensors",
    "..",
    ".",
    "",
    "/",
    "model.bin",
    1,
    None,
    True,
    2.5,
]


@pytest.mark.parametrize("name", UNSAFE_NAMES, ids=str)
def test_shard_names_may_not_leave_the_folder(name: object, plain: Path) -> None:
    """The name leads to a valid file, so only the name can be the reason."""
    (plain / "sub").mkdir()
    for place in (plain.parent / "outside.safetensors", plain / "sub" / "inside.safetensors", plain / "model.bin"):
        shutil.copyfile(plain / SINGLE, place)
    write_index(plain, {"weight_map": {"model.embed_tokens.weight": name}})
    refused(plain, INDEX, repr(name), "own folder")


def test_shard_names_may_not_be_absolute(plain: Path) -> None:
    outside = shutil.copyfile(plain / SINGLE, plain.parent / "outside.safetensors")
    write_index(plain, {"weight_map": {"model.embed_tokens.weight": str(outside)}})
    refused(plain, INDEX, "names the shard", str(outside)[:20], "own folder")


@pytest.mark.parametrize("name", ["..\\outside.safetensors", "C:\\x.safetensors", "a\0b.safetensors"], ids=repr)
def test_shard_names_of_other_systems_lead_nowhere(name: str, plain: Path) -> None:
    shutil.copyfile(plain / SINGLE, plain.parent / "outside.safetensors")
    write_index(plain, {"weight_map": {"model.embed_tokens.weight": name}})
    refused(plain, "shard", "; ")


@pytest.mark.parametrize("length", [300, 5000])
def test_a_shard_name_too_long_for_the_file_system(length: int, plain: Path) -> None:
    write_index(plain, {"weight_map": {"model.embed_tokens.weight": "x" * length + ".safetensors"}})
    refused(plain, "xxx", "no such shard")


BROKEN_INDICES: dict[str, Any] = {
    "empty": "",
    "cut": '{"weight_map": {"a": ',
    "too deep": "[" * 200_000,
    "a list": [],
    "null": None,
    "a number": 7,
    "no map": {"metadata": {}},
    "a list for a map": {"weight_map": ["model.safetensors"]},
    "null for a map": {"weight_map": None},
    "a list for a shard": {"weight_map": {"a": ["model.safetensors"]}},
    "an object for a shard": {"weight_map": {"a": {}}},
    "a number among the shards": {"weight_map": {"a": "model.safetensors", "b": 2}},
}


@pytest.mark.parametrize("name", BROKEN_INDICES)
def test_indices_that_are_none(name: str, plain: Path) -> None:
    write_index(plain, BROKEN_INDICES[name])
    refused(plain, INDEX, "not a safetensors index", "download it again")


def test_an_index_that_is_not_utf8(plain: Path) -> None:
    (plain / SINGLE).unlink()
    (plain / INDEX).write_bytes(b'{"weight_map": {"a": "\xff.safetensors"}}')
    refused(plain, INDEX, "not a safetensors index")


def test_an_index_that_lists_nothing(plain: Path) -> None:
    write_index(plain, {"weight_map": {}})
    refused(plain, 'tensor "', "is missing", "download the checkpoint again")


def test_an_index_that_is_a_folder(plain: Path) -> None:
    (plain / SINGLE).unlink()
    (plain / INDEX).mkdir()
    refused(plain, INDEX, "not a safetensors index")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "pytorch_model-00001-of-00002.bin"]
)
def test_pickles_are_never_opened(name: str, plain: Path) -> None:
    (plain / SINGLE).unlink()
    (plain / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(plain, name, "pickle", "can run code", "convert the checkpoint to safetensors")


def test_a_pickle_beside_the_weights_is_left_alone(plain: Path) -> None:
    (plain / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert WeightStore.open(plain, FalconH1Config.load(plain)).entries


def test_no_weights_at_all(plain: Path) -> None:
    (plain / SINGLE).unlink()
    refused(plain, SINGLE, INDEX, "Hugging Face layout")


def test_a_folder_in_the_weights_place(plain: Path) -> None:
    (plain / SINGLE).unlink()
    (plain / SINGLE).mkdir()
    refused(plain, SINGLE, "not a regular file")


def test_a_shard_that_is_a_folder(sharded: Path) -> None:
    shard = shards(sharded)[0]
    shard.unlink()
    shard.mkdir()
    refused(sharded, shard.name, "no such shard")


def test_a_shard_that_is_not_safetensors(sharded: Path) -> None:
    shard = shards(sharded)[-1]
    shard.write_bytes(b"<!DOCTYPE html><html>the Hub says no</html>")
    refused(sharded, shard.name, "not a safetensors file")


def test_a_pointer_file_instead_of_the_weights(plain: Path) -> None:
    """A clone without Git LFS leaves pointer files."""
    (plain / SINGLE).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 11063192\n", encoding="utf-8"
    )
    refused(plain, SINGLE, "a Git LFS pointer", "run git lfs pull")
