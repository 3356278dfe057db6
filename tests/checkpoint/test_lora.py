"""LoRA: rows with an adapter merged are those of PEFT's merge_and_unload."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from odd_files import bounded
from safetensors.torch import load_file, save_file

from h1export.checkpoint import resolve
from h1export.checkpoint.lora_config import LoraConfig
from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import tensor_shapes

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj", "out_proj"]
CLOSE = 1e-6  # of the range of a tensor


def base(checkpoint: Path) -> Any:
    from transformers import FalconH1ForCausalLM

    model = FalconH1ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.config.model_type = "other"  # of Mamba models PEFT adapts no out_proj, whose weight a kernel reads unadapted
    return model


def save_adapter(checkpoint: Path, out: Path, seed: int = 0, **config: Any) -> Path:
    """Save an adapter of random matrices by PEFT."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(base(checkpoint), peft.LoraConfig(**{"r": 4, "lora_alpha": 7} | config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(out)
    return out


def merged(checkpoint: Path, adapters: list[Path]) -> dict[str, Any]:
    """Return PEFT's merged weights, by checkpoint name."""
    model = base(checkpoint)
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def open_store(checkpoint: Path, *adapters: Path) -> WeightStore:
    return WeightStore.open(checkpoint, FalconH1Config.load(checkpoint), adapters=adapters)


def assert_merged(checkpoint: Path, adapters: list[Path]) -> None:
    store = open_store(checkpoint, *adapters)
    plain = open_store(checkpoint)
    truth = merged(checkpoint, adapters)
    changed = 0
    for name, shape in tensor_shapes(FalconH1Config.load(checkpoint)).items():
        found = store.rows(name, 0, shape[0])
        assert np.abs(found - truth[name]).max() <= CLOSE * np.ptp(truth[name]), name
        halves = [store.rows(name, 0, shape[0] // 3), store.rows(name, shape[0] // 3, shape[0])]
        np.testing.assert_array_equal(np.concatenate(halves), found)
        changed += not np.array_equal(found, plain.rows(name, 0, shape[0]))
    assert changed == len({name for adapter in store.adapters for name in adapter.products})


CONFIGS: dict[str, dict[str, Any]] = {
    "all linear": {"target_modules": "all-linear"},
    "every projection": {"target_modules": MODULES},
    "mamba": {"target_modules": ["in_proj", "out_proj"], "fan_in_fan_out": False},
    "a regular expression": {"target_modules": r".*layers\.0\.self_attn\.[qv]_proj"},
    "rank-stabilised": {"target_modules": MODULES, "use_rslora": True, "r": 8},
    "patterns": {
        "target_modules": MODULES,
        "rank_pattern": {"in_proj": 2, r"layers\.0\..*\.q_proj": 6},
        "alpha_pattern": {"in_proj": 32, "mamba.out_proj": 1},
    },
    "the head": {"target_modules": ["q_proj", "lm_head"]},
    "the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "fan in, fan out": {"target_modules": MODULES, "fan_in_fan_out": True},
    "some layers": {"target_modules": MODULES, "layers_to_transform": [1], "layers_pattern": "layers"},
}


@pytest.mark.parametrize("tied", ["plain", "tied"])
@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rows_are_pefts(case: str, tied: str, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tied)
    assert_merged(checkpoint, [save_adapter(checkpoint, tmp_path / "adapter", **CONFIGS[case])])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_adapters_are_merged_in_order(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    one = save_adapter(checkpoint, tmp_path / "one", 1, target_modules=MODULES)
    two = save_adapter(checkpoint, tmp_path / "two", 2, target_modules=["q_proj", "lm_head"], use_rslora=True)
    assert_merged(checkpoint, [one, two])
    assert open_store(checkpoint, one).adapters[0].sha256 != open_store(checkpoint, two).adapters[0].sha256


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_embedded_model(tmp_path: Path) -> None:
    checkpoint = resolve.embedded_model()
    assert_merged(checkpoint, [save_adapter(checkpoint, tmp_path / "adapter", target_modules=[*MODULES, "lm_head"])])


@pytest.fixture(scope="module")
def good(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(make_checkpoint(), tmp_path_factory.mktemp("lora") / "adapter", target_modules=["q_proj"])


@pytest.fixture
def adapter(good: Path, tmp_path: Path) -> Path:
    """An adapter that the test may damage."""
    return Path(shutil.copytree(good, tmp_path / "other name"))


def test_the_folders_name_decides_nothing(good: Path, adapter: Path, make_checkpoint: Callable[..., Path]) -> None:
    hashes = {open_store(make_checkpoint(), folder).adapters[0].sha256 for folder in (good, adapter)}
    assert len(hashes) == 1
    change(adapter, lora_alpha=8)
    assert open_store(make_checkpoint(), adapter).adapters[0].sha256 not in hashes


def change(folder: Path, **keys: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "use_dora"),
    ({"peft_type": "IA3"}, "'IA3'"),
    ({"peft_type": None}, "'LORA'"),
    ({"bias": "all"}, "bias"),
    ({"lora_bias": True}, "lora_bias"),
    ({"use_qalora": True}, "use_qalora"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"target_parameters": ["x"]}, "target_parameters"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    ({"a_key_of_tomorrow": 3}, "a_key_of_tomorrow"),
    ({"r": 0}, "'r'"),
    ({"r": 5}, "shape"),
    ({"rank_pattern": {"q_proj": 2}}, "shape"),
    ({"rank_pattern": {"(": 2}}, "RE2 does not take"),
    ({"rank_pattern": {"(((a{1000}){1000}){1000})": 2}}, "RE2 does not take"),  # memory that grows with the product
    ({"alpha_pattern": {r"(a)\1": 2}}, "RE2 does not take"),
    ({"rank_pattern": {"\ud800": 2}}, "RE2 does not take"),
    ({"rank_pattern": {"a" * 201: 2}}, "201 characters"),
    ({"rank_pattern": []}, None),  # type: ignore[list-item]
    ({"lora_alpha": "x"}, "lora_alpha"),
    ({"lora_alpha": float("nan")}, "lora_alpha"),
]


@pytest.mark.parametrize(
    "pattern", ["((.*)*)*z", r"(.*)*(.*)*(.*)*z", r"((\w|\.)*)*z", "(a|a?)+z", "(?:_?){200}_{200}"]
)
def test_no_pattern_takes_long(pattern: str, tmp_path: Path) -> None:
    """Python's own library needs longer than anybody waits for some of these."""
    keys = {"peft_type": "LORA", "rank_pattern": {pattern: 2}, "alpha_pattern": {pattern: 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(keys))
    with bounded():
        config = LoraConfig.load(tmp_path)
        assert config.rank("model.layers.0.mamba.in_proj" * 9) == 8


@pytest.mark.parametrize(
    "keys",
    [
        {"unsloth_version": "2026.1", "library_name": "peft", "peft_version": "0.20.0"},
        {"runtime_config": {"ephemeral_gpu_offload": True}},
        {"a_key_of_tomorrow": None, "another": {}, "merge_weights": False},
        {"target_modules": None, "exclude_modules": ["x"], "lora_dropout": 0.5, "task_type": None},
    ],
    ids=str,
)
def test_keys_that_change_nothing(keys: dict[str, Any], adapter: Path, make_checkpoint: Callable[..., Path]) -> None:
    before = open_store(make_checkpoint(), adapter).adapters[0].sha256
    change(adapter, **keys)
    assert open_store(make_checkpoint(), adapter).adapters[0].sha256 == before


@pytest.mark.parametrize(("keys", "mentioned"), REFUSED, ids=str)
def test_what_is_refused(
    keys: dict[str, Any], mentioned: str | None, adapter: Path, make_checkpoint: Callable[..., Path]
) -> None:
    change(adapter, **keys)
    if mentioned is None:
        open_store(make_checkpoint(), adapter)
        return
    with pytest.raises(H1ExportError) as caught:
        open_store(make_checkpoint(), adapter)
    assert mentioned in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.next_step


STEM = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no partner": (lambda t: t.pop(f"{STEM}.lora_A.weight"), "partner"),
    "shape": (lambda t: t.update({f"{STEM}.lora_B.weight": torch.ones(3, 4)}), "shape"),
    "integers": (lambda t: t.update({f"{STEM}.lora_B.weight": t[f"{STEM}.lora_B.weight"].to(torch.int32)}), "'I32'"),
    "another model": (
        lambda t: t.update({f"base_model.model.x.lora_{s}.weight": torch.ones(4, 4) for s in "AB"}),
        "no projection",
    ),
    "a layer that is not there": (
        lambda t: t.update({f"{STEM.replace('0', '99')}.lora_{s}.weight": torch.ones(4, 4) for s in "AB"}),
        "no projection",
    ),
    "dora": (lambda t: t.update({f"{STEM}.lora_magnitude_vector.weight": torch.ones(4)}), "no matrix of LoRA"),
    **{
        f"the prefix {prefix}": (
            lambda t, prefix=prefix: t.update({f"{prefix}{name}": t.pop(name) for name in list(t)}),  # type: ignore[misc]
            'belongs to "model.layers.0.self_attn.q_proj.weight" under another name',
        )
        for prefix in ("module.", "_orig_mod.", "base_model.model.", "module._orig_mod.")
    },
    "a whole weight": (
        lambda t: t.update({"base_model.model.model.final_layernorm.weight": torch.full((128,), 3.0)}),
        "modules_to_save",
    ),
    "nothing": (lambda t: t.clear(), "no matrix"),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_damaged_adapter(fault: str, adapter: Path, make_checkpoint: Callable[..., Path]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    damage, mentioned = DAMAGE[fault]
    damage(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(H1ExportError, match=mentioned) as caught:
        open_store(make_checkpoint(), adapter)
    assert str(caught.value).startswith(str(adapter))


def test_folders_that_are_no_adapter(adapter: Path, make_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(H1ExportError, match=r"adapter_config\.json"):
        open_store(make_checkpoint(), make_checkpoint())
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(H1ExportError, match="pickle"):
        open_store(make_checkpoint(), adapter)


def test_an_adapter_in_the_models_folder(adapter: Path, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """transformers' Auto classes load both, so the model alone is another one."""
    checkpoint = make_checkpoint()
    folder = Path(shutil.copytree(checkpoint, tmp_path / "both"))
    shutil.copyfile(adapter / "adapter_config.json", folder / "adapter_config.json")
    assert open_store(folder).fingerprint() == open_store(checkpoint).fingerprint()  # there is no adapter yet
    shutil.copyfile(adapter / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    for given in ([], [adapter]):
        with pytest.raises(H1ExportError, match=r"holds an adapter beside the model.*; give the folder with --adapter"):
            open_store(folder, *given)
    (tmp_path / "link").symlink_to(folder)
    for given in (folder, tmp_path / "link"):
        found = open_store(folder, given).adapters[0]
        assert found.sha256 == open_store(checkpoint, adapter).adapters[0].sha256


def test_an_adapter_on_integers(adapter: Path, make_gptq: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(H1ExportError, match="quantised already"):
        open_store(make_gptq(tmp_path / "in").folder, adapter)


@pytest.mark.parametrize(
    ("name", "shown"), [("org/Model-1", True), ("[red]x[/red]", False), (None, False), (9182736, False)]
)
def test_an_adapter_in_the_place_of_a_model(name: Any, shown: bool, adapter: Path) -> None:
    change(adapter, base_model_name_or_path=name)
    with pytest.raises(H1ExportError, match=r"is an adapter.*--adapter") as caught:
        resolve.resolve(str(adapter))
    assert (str(name) in str(caught.value)) == shown
