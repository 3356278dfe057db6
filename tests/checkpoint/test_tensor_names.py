"""Names that wrappers change are recognised, and what is no part of the model is ignored and named."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.tensor_names import is_extra, plain_name
from h1export.commands.build import ignored_in
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import tensor_shapes

PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "model.", "_fsdp_wrapped_module.")


@pytest.fixture(scope="module")
def small(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("plain", num_hidden_layers=1, hidden_size=64, vocab_size=32, intermediate_size=32)


@pytest.fixture
def renamed(small: Path, tmp_path: Path) -> Callable[[Callable[[str], str]], Path]:
    def write(change: Callable[[str], str], extra: dict[str, torch.Tensor] | None = None) -> Path:
        shutil.copyfile(small / "config.json", tmp_path / "config.json")
        tensors = {change(name): tensor for name, tensor in load_file(small / "model.safetensors").items()}
        save_file(tensors | (extra or {}), tmp_path / "model.safetensors")
        return tmp_path

    return write


def opened(folder: Path) -> WeightStore:
    return WeightStore.open(folder, FalconH1Config.load(folder))


@pytest.mark.parametrize(
    "prefix", [*PREFIXES, *("".join(pair) for pair in itertools.permutations(PREFIXES, 2)), "causal_lm."]
)
def test_a_prefix_is_named(prefix: str, renamed: Callable[..., Path]) -> None:
    folder = renamed(lambda name: prefix + name)
    with pytest.raises(H1ExportError, match="is missing, and is there as") as caught:
        opened(folder)
    assert f'"{prefix}" is in front' in str(caught.value)
    assert "download" not in str(caught.value)
    assert ("merge_and_unload" in str(caught.value)) == ("base_model" in prefix)


def test_a_missing_prefix_is_named(renamed: Callable[..., Path]) -> None:
    folder = renamed(lambda name: name.removeprefix("model."))
    with pytest.raises(H1ExportError, match=r'the prefix "model\." is missing\); save the model itself'):
        opened(folder)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda name: name.replace("model.", "module.", 1), r'its prefix is "module\." instead of "model\."'),
        (lambda name: name.replace("model.", "base_model.model.", 1), r'the prefix "base_model\." is in front'),
        (
            lambda name: name.replace("model.", "model.language_model.", 1),
            r'its prefix is "model\.language_model\." instead of "model\."',
        ),
        (lambda name: f"module.{name}" if "embed" in name else name, r'the prefix "module\." is in front'),
        (lambda name: name.replace("_tokens", "_tokens.base_layer"), r'added "base_layer" inside.*merge_and_unload'),
        (lambda name: name.replace("layers.0", "layers.0._orig_mod"), r'added "_orig_mod" inside'),
    ],
)
def test_other_changes_are_named(change: Callable[[str], str], shown: str, renamed: Callable[..., Path]) -> None:
    with pytest.raises(H1ExportError, match=shown):
        opened(renamed(change))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "base_model.model.", "language_model."])
def test_a_checkpoint_with_both_names_says_so(prefix: str, renamed: Callable[..., Path]) -> None:
    name = "model.embed_tokens.weight"
    folder = renamed(lambda name: name, {f"{prefix}{name}": torch.zeros(3)})
    with pytest.raises(H1ExportError, match=f'is "{name}" under another name .*"{prefix}".*both; remove') as caught:
        opened(folder)
    assert "download" not in str(caught.value)


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.default.weight", "lora_magnitude_vector", "ia3_l"])
def test_an_adapter_inside_the_model_is_named(part: str, renamed: Callable[..., Path]) -> None:
    folder = renamed(lambda name: name, {f"model.layers.0.mamba.in_proj.{part}": torch.zeros(3)})
    with pytest.raises(H1ExportError, match=r"adapter that is not merged; call merge_and_unload"):
        opened(folder)


def test_a_name_without_a_wrapper_is_plain(small: Path) -> None:
    for name in tensor_shapes(FalconH1Config.load(small)):
        assert plain_name(name) == name
        assert not is_extra(name)
        for prefix in PREFIXES:
            assert plain_name(prefix + name) == name


EXTRAS = (
    "model.rotary_emb.inv_freq",
    "rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.cos_cached",
    "model.layers.0.mamba.mup_vector",
    "score.weight",
    "classifier.bias",
    "v_head.summary.weight",
    "value_head.weight",
    "mtp.layers.0.self_attn.q_proj.weight",
    "model.mtp_layers.0.weight",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_buffers_and_other_heads_are_ignored_and_told(
    dtype: torch.dtype, small: Path, renamed: Callable[..., Path]
) -> None:
    folder = renamed(lambda name: name, {name: torch.zeros(3).to(dtype) for name in EXTRAS})
    store = opened(folder)
    assert store.ignored == tuple(sorted(EXTRAS))
    assert store.fingerprint() == opened(small).fingerprint()
    (line,) = ignored_in(folder)
    assert all(name in line or name[:40] in line for name in EXTRAS)


def test_a_classifier_is_told_so(renamed: Callable[..., Path]) -> None:
    folder = renamed(lambda name: name.replace("lm_head", "score"))
    with pytest.raises(H1ExportError, match=r"another head instead; give a checkpoint of the language model"):
        opened(folder)
