"""FalconH1Config: what is read from the configs that exist, and from the keys that are absent."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import FalconH1Config as TransformersConfig

from h1export.model.falcon_h1.config import USED_KEYS, FalconH1Config
from h1export.model.falcon_h1.ignored_keys import IGNORED_KEYS, JUDGED_KEYS, STATED
from h1export.model.falcon_h1.tensors import tensor_shapes

MINIMAL = {"model_type": "falcon_h1"}

# Released sizes: layers, hidden, MLP, vocabulary, query/KV heads, head_dim, d_ssm, SSM heads, their width, state,
# groups, context, rms_norm, tied head, and the parameters that the model's name promises.
FAMILY: dict[str, tuple[int, int, int, int, int, int, int, int, int, int, int, int, int, bool, bool, float]] = {
    "Tiny-R-90M": (24, 512, 768, 32768, 8, 2, 64, 768, 24, 32, 64, 1, 262144, False, True, 90e6),
    "0.5B": (36, 1024, 2048, 32784, 8, 2, 64, 1536, 24, 64, 128, 1, 16384, False, False, 0.5e9),
    "1.5B": (24, 2048, 4608, 65536, 8, 2, 128, 3072, 48, 64, 256, 1, 131072, True, False, 1.5e9),
    "1.5B-Deep": (66, 1280, 3072, 65536, 6, 2, 128, 1536, 24, 64, 256, 1, 131072, True, False, 1.5e9),
    "3B": (32, 2560, 6144, 65536, 10, 2, 128, 4096, 32, 128, 256, 1, 131072, True, False, 3e9),
    "7B": (44, 3072, 12288, 130048, 12, 2, 128, 3072, 24, 128, 256, 1, 262144, True, False, 7.5e9),
    "34B": (72, 5120, 21504, 261120, 20, 4, 128, 4096, 32, 128, 256, 2, 262144, True, False, 34e9),
}
COLUMNS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "mamba_d_ssm",
    "mamba_n_heads",
    "mamba_d_head",
    "mamba_d_state",
    "mamba_n_groups",
    "max_position_embeddings",
    "mamba_rms_norm",
    "tie_word_embeddings",
)

EXPECTED_RELEASED = FalconH1Config(
    vocab_size=32784,
    hidden_size=1024,
    intermediate_size=2048,
    num_hidden_layers=36,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
    max_position_embeddings=16384,
    rope_theta=1e11,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    projectors_bias=False,
    mamba_d_ssm=1536,
    mamba_n_heads=24,
    mamba_d_head=64,
    mamba_n_groups=1,
    mamba_d_state=128,
    mamba_d_conv=4,
    mamba_chunk_size=128,
    mamba_conv_bias=True,
    mamba_proj_bias=False,
    mamba_rms_norm=False,
    mamba_norm_before_gate=False,
    time_step_limit=(0.0, math.inf),
    embedding_multiplier=5.65685,
    lm_head_multiplier=0.0390625,
    key_multiplier=0.390625,
    attention_in_multiplier=1.0,
    attention_out_multiplier=0.9375,
    ssm_in_multiplier=1.25,
    ssm_out_multiplier=0.235702,
    ssm_multipliers=(0.353553, 0.25, 0.353553, 0.5, 0.353553),
    mlp_multipliers=(0.883884, 0.585938),
    bos_token_id=1,
    eos_token_ids=(11,),
    pad_token_id=0,
)


def fields_of(config: TransformersConfig) -> dict[str, Any]:
    """Every FalconH1Config field as transformers' config object has it."""
    renamed = {
        "rope_theta": config.rope_parameters["rope_theta"],
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "eos_token_ids": tuple(config.eos_token_id)
        if isinstance(config.eos_token_id, list)
        else (config.eos_token_id,),
        "mamba_d_ssm": config.mamba_d_ssm or config.mamba_expand * config.hidden_size,
        "ssm_multipliers": tuple(config.ssm_multipliers),
        "mlp_multipliers": tuple(config.mlp_multipliers),
        "time_step_limit": tuple(config.time_step_limit),
    }
    return {
        f.name: renamed[f.name] if f.name in renamed else getattr(config, f.name)
        for f in dataclasses.fields(FalconH1Config)
    }


def test_the_released_config_is_read_key_by_key(released: dict[str, Any]) -> None:
    assert FalconH1Config.from_config(released) == EXPECTED_RELEASED


def test_the_released_config_is_read_from_its_file(released: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(released), encoding="utf-8")
    assert FalconH1Config.load(tmp_path) == EXPECTED_RELEASED


def test_the_released_sizes_give_the_widths_of_the_layers() -> None:
    model_config = EXPECTED_RELEASED
    assert model_config.bc_dim == 128
    assert model_config.conv_dim == 1792
    assert model_config.in_proj_parts == (1536, 1536, 128, 128, 24)
    assert model_config.attention_dim == 512
    assert model_config.kv_dim == 128


def test_two_groups_widen_b_and_c(config_of: Callable[..., FalconH1Config]) -> None:
    model_config = config_of(mamba_n_groups=3)
    assert (model_config.bc_dim, model_config.conv_dim, model_config.in_proj_parts) == (
        384,
        1536 + 768,
        (1536, 1536, 384, 384, 24),
    )


def test_defaults_are_those_of_transformers() -> None:
    assert dataclasses.asdict(FalconH1Config.from_config(MINIMAL)) == fields_of(TransformersConfig())


SAVED: dict[str, dict[str, Any]] = {
    "defaults": {},
    "lower_limit": {"time_step_limit": (0.1, float("inf"))},
    "both_limits": {"time_step_limit": (0.001, 0.1)},
    "rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e11}},
    "flat_rope": {"rope_theta": 1e9},
    "expand": {"mamba_d_ssm": None, "mamba_expand": 3, "mamba_n_heads": 48},
    "switches": {
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "heads": {
        "num_key_value_heads": None,
        "head_dim": 64,
        "mamba_d_head": 16,
        "mamba_n_heads": 64,
        "mamba_n_groups": 4,
    },
    "multipliers": {
        "key_multiplier": 0.39,
        "ssm_multipliers": [0.1, 0.2, 0.3, 0.4, 0.5],
        "mlp_multipliers": [2.5, 0.5],
    },
    "tokens": {"eos_token_id": [11, 228], "bos_token_id": 17, "pad_token_id": 5},
}


@pytest.mark.parametrize("name", SAVED)
def test_what_transformers_saves_is_read_back(name: str, tmp_path: Path) -> None:
    config = TransformersConfig(**SAVED[name])
    config.save_pretrained(tmp_path)
    assert dataclasses.asdict(FalconH1Config.load(tmp_path)) == fields_of(config)


def test_transformers_still_saves_infinity_as_the_object_that_the_reader_knows(tmp_path: Path) -> None:
    TransformersConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["time_step_limit"] == [0.0, {"__float__": "Infinity"}]


def test_every_random_checkpoint_is_read_as_transformers_reads_it(checkpoint: Path) -> None:
    assert dataclasses.asdict(FalconH1Config.load(checkpoint)) == fields_of(
        TransformersConfig.from_pretrained(checkpoint)
    )


@pytest.mark.parametrize("name", FAMILY)
def test_every_released_size_parses(name: str, released: dict[str, Any]) -> None:
    """The tensors that the config describes have as many parameters as the model's name promises, give or take 7 %."""
    *values, parameters = FAMILY[name]
    row = dict(zip(COLUMNS, values, strict=True))
    model_config = FalconH1Config.from_config(released | row)
    assert {key: getattr(model_config, key) for key in row} == row
    assert sum(math.prod(shape) for shape in tensor_shapes(model_config).values()) == pytest.approx(
        parameters, rel=0.07
    )


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"rope_theta": 100_000_000_000}, "rope_theta", 1e11),
        ({"rope_theta": None}, "rope_theta", 1e4),
        ({"rope_theta": None, "rope_parameters": {}}, "rope_theta", 1e4),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, "rope_theta", 5e5),
        ({"rope_theta": 5e5, "rope_parameters": {"type": "default", "rope_theta": 5e5}}, "rope_theta", 5e5),
        ({"rope_theta": 5e5, "rope_parameters": None}, "rope_theta", 5e5),
        ({"head_dim": None}, "head_dim", 128),
        ({"num_key_value_heads": None}, "num_key_value_heads", 8),
        ({"mamba_d_ssm": None, "mamba_expand": 3, "mamba_n_heads": 48}, "mamba_d_ssm", 3072),
        ({"mamba_d_head": "auto"}, "mamba_d_head", 64),
        ({"mamba_d_head": None}, "mamba_d_head", 64),
        ({"time_step_limit": None}, "time_step_limit", (0.0, math.inf)),
        ({"time_step_limit": [0, math.inf]}, "time_step_limit", (0.0, math.inf)),
        ({"time_step_limit": [0, 1]}, "time_step_limit", (0.0, 1.0)),
        ({"ssm_multipliers": None}, "ssm_multipliers", (1.0,) * 5),
        ({"mlp_multipliers": [1, 2]}, "mlp_multipliers", (1.0, 2.0)),
        ({"key_multiplier": None}, "key_multiplier", 1.0),
        ({"key_multiplier": 2}, "key_multiplier", 2.0),
        ({"mamba_rms_norm": None}, "mamba_rms_norm", False),
        ({"mamba_norm_before_gate": None}, "mamba_norm_before_gate", True),
        ({"eos_token_id": None}, "eos_token_ids", ()),
        ({"eos_token_id": [11, 228]}, "eos_token_ids", (11, 228)),
        ({"bos_token_id": None}, "bos_token_id", None),
        ({"pad_token_id": None}, "pad_token_id", None),
        ({"mamba_use_mlp": None}, "num_hidden_layers", 36),
        ({"layers_block_type": ["hybrid"] * 36, "layer_types": ["hybrid"] * 36}, "num_hidden_layers", 36),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7}}, "rope_theta", 7.0),
        (
            {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7}, "rope_scaling": {"type": "default"}},
            "rope_theta",
            5.0,
        ),
        ({"rope_scaling": {"type": "linear", "factor": 1.0}}, "rope_theta", 1e11),
        ({"rope_scaling": {}, "attn_layer_indices": [0, 2], "mamba_use_mlp": False}, "rope_theta", 1e11),
        ({"hidden_act": "swish"}, "num_hidden_layers", 36),
        ({"quantization_config": None, "auto_map": None, "hidden_act": None}, "num_hidden_layers", 36),
    ],
)
def test_spellings_and_nulls(
    changes: dict[str, Any], field: str, value: object, config_of: Callable[..., FalconH1Config]
) -> None:
    found = getattr(config_of(**changes), field)
    assert found == value
    assert type(found) is type(value)


def test_keys_are_used_or_ignored_for_a_reason_and_never_both() -> None:
    assert not (USED_KEYS | JUDGED_KEYS) & IGNORED_KEYS.keys()
    assert all(reason.strip() for reason in IGNORED_KEYS.values())


def test_every_field_is_a_key_that_is_used() -> None:
    renamed = {"eos_token_ids": "eos_token_id"}
    assert {renamed.get(field.name, field.name) for field in dataclasses.fields(FalconH1Config)} <= USED_KEYS


class Recorder(dict[str, Any]):
    """A config that remembers which keys were read."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.request: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.request.add(key)
        return super().get(key, default)


def test_every_used_key_is_really_read_and_no_other(released: dict[str, Any]) -> None:
    config = Recorder(released | {"mamba_d_ssm": None, "mamba_n_heads": 32})
    FalconH1Config.from_config(config)
    assert config.request == USED_KEYS | JUDGED_KEYS - STATED.keys()


def test_every_key_that_transformers_saves_is_known() -> None:
    """Keys of the config class itself; what the base class adds is saved only where it differs from its default."""
    own = {field.name for field in dataclasses.fields(TransformersConfig)} - {
        field.name for field in dataclasses.fields(TransformersConfig.__base__)
    }
    assert own <= USED_KEYS | IGNORED_KEYS.keys() | JUDGED_KEYS


def test_an_ignored_key_changes_nothing(released: dict[str, Any]) -> None:
    assert FalconH1Config.from_config(released | dict.fromkeys(IGNORED_KEYS, "anything")) == EXPECTED_RELEASED
