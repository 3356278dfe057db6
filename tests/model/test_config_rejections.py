"""FalconH1Config refuses what cannot be carried through exactly, and says which key of which file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import USED_KEYS, FalconH1Config
from h1export.model.falcon_h1.ignored_keys import IGNORED_KEYS, JUDGED_KEYS

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "mamba_n_heads",
    "mamba_n_groups",
    "mamba_d_state",
    "mamba_d_conv",
    "mamba_chunk_size",
)
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "mamba_d_ssm", "mamba_d_head")
FLAGS = (
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "projectors_bias",
    "mamba_conv_bias",
    "mamba_proj_bias",
    "mamba_rms_norm",
    "mamba_norm_before_gate",
)
NUMBERS = (
    "rms_norm_eps",
    "rope_theta",
    "embedding_multiplier",
    "lm_head_multiplier",
    "key_multiplier",
    "attention_in_multiplier",
    "attention_out_multiplier",
    "ssm_in_multiplier",
    "ssm_out_multiplier",
)
LISTS = {"ssm_multipliers": 5, "mlp_multipliers": 2}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

NOT_A_SIZE: tuple[object, ...] = (
    0,
    -1,
    1.0,
    2.5,
    "8",
    True,
    False,
    [8],
    {},
    math.nan,
    math.inf,
    -math.inf,
    1 << 40,
    10**400,
)
NOT_A_NUMBER: tuple[object, ...] = (
    0,
    0.0,
    -0.0,
    -1.5,
    "1.0",
    True,
    [1.0],
    {},
    math.nan,
    math.inf,
    -math.inf,
    {"__float__": "Infinity"},
)
NOT_A_FLAG: tuple[object, ...] = (0, 1, "true", "", 1.0, [], {}, math.nan)
NOT_A_TOKEN: tuple[object, ...] = (-1, 1.0, "1", True, {}, [1, -1], [None], ["1"], [[1]], math.nan)
TOO_LARGE_FOR_A_FLOAT = 10**400  # JSON allows it


def refused(config: object, *mentioned: str) -> None:
    """Check that the config is refused in one line with the file, everything in ``mentioned``, and a next step."""
    with pytest.raises(H1ExportError) as caught:
        FalconH1Config.from_config(config, "folder/config.json")
    message = str(caught.value)
    assert message.startswith("folder/config.json")
    assert all(text in message for text in mentioned), message
    assert caught.value.next_step
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [*NOT_A_SIZE, None], ids=lambda value: str(value)[:12])
def test_sizes(key: str, value: object, released: dict[str, Any]) -> None:
    refused(released | {key: value}, f"{key!r}", "whole number")


@pytest.mark.parametrize("key", OPTIONAL_SIZES)
@pytest.mark.parametrize("value", NOT_A_SIZE, ids=lambda value: str(value)[:12])
def test_optional_sizes(key: str, value: object, released: dict[str, Any]) -> None:
    refused(released | {key: value}, f"{key!r}", "whole number")


@pytest.mark.parametrize("value", NOT_A_SIZE, ids=lambda value: str(value)[:12])
def test_expand_where_it_is_used(value: object, released: dict[str, Any]) -> None:
    refused(released | {"mamba_d_ssm": None, "mamba_expand": value}, "'mamba_expand'", "whole number")


@pytest.mark.parametrize(
    ("key", "limit"), [("num_hidden_layers", 1024), ("mamba_d_conv", 256), ("vocab_size", 1 << 24)]
)
def test_limits_are_inclusive_and_no_further(key: str, limit: int, released: dict[str, Any]) -> None:
    assert getattr(FalconH1Config.from_config(released | {key: limit}), key) == limit
    refused(released | {key: limit + 1}, f"{key!r}", f"from 1 to {limit}")


@pytest.mark.parametrize("key", FLAGS)
@pytest.mark.parametrize("value", NOT_A_FLAG, ids=str)
def test_flags(key: str, value: object, released: dict[str, Any]) -> None:
    refused(released | {key: value}, f"{key!r}", "true or false")


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", NOT_A_NUMBER, ids=str)
def test_numbers(key: str, value: object, released: dict[str, Any]) -> None:
    refused(released | {key: value}, f"{key!r}", "expected a")


@pytest.mark.parametrize("key", LISTS)
@pytest.mark.parametrize("value", NOT_A_NUMBER, ids=str)
def test_a_bad_number_in_a_list(key: str, value: object, released: dict[str, Any]) -> None:
    refused(released | {key: [*[1.0] * (LISTS[key] - 1), value]}, f"{key!r}", "expected a")


@pytest.mark.parametrize("key", LISTS)
@pytest.mark.parametrize("value", [[], [1.0], [1.0] * 3, [1.0] * 6, 1.0, "11", {}, True], ids=str)
def test_lists_of_another_length_or_kind(key: str, value: object, released: dict[str, Any]) -> None:
    refused(released | {key: value}, f"{key!r}", f"a list of {LISTS[key]} numbers")


@pytest.mark.parametrize("key", TOKENS)
@pytest.mark.parametrize("value", NOT_A_TOKEN, ids=str)
def test_token_ids(key: str, value: object, released: dict[str, Any]) -> None:
    refused(released | {key: value}, f"{key!r}", "token id")


INTERVALS: list[object] = [
    [],
    [0.0],
    [0.0, 1.0, 2.0],
    [0.1, 0.1],
    [0.2, 0.1],
    [-0.1, 0.1],
    [0.0, 0.0],
    [math.nan, 1.0],
    [0.0, math.nan],
    [math.inf, math.inf],
    [-math.inf, 0.0],
    [0.0, -math.inf],
    [{"__float__": "Infinity"}] * 2,
    [0.0, {"__float__": "-Infinity"}],
    [0.0, {"__float__": "NaN"}],
    [0.0, "inf"],
    [0.0, None],
    [True, 2.0],
    "01",
    0.1,
    {"low": 0},
]


@pytest.mark.parametrize("value", INTERVALS, ids=str)
def test_time_step_limits(value: object, released: dict[str, Any]) -> None:
    refused(released | {"time_step_limit": value}, "'time_step_limit'", "expected")


@pytest.mark.parametrize("key", [*NUMBERS, *LISTS, "time_step_limit"])
def test_integers_too_large_for_a_float(key: str, released: dict[str, Any]) -> None:
    value = [TOO_LARGE_FOR_A_FLOAT] * {**LISTS, "time_step_limit": 2}.get(key, 1)
    refused(released | {key: value[0] if key in NUMBERS else value}, f"{key!r}", "expected")


@pytest.mark.parametrize(
    ("changes", "mentioned"),
    [
        ({"model_type": "llama"}, ("model_type", "'llama'", "Falcon-H1")),
        ({"model_type": None}, ("model_type", "None")),
        ({"model_type": ["falcon_h1"]}, ("model_type",)),
        ({"hidden_act": "gelu"}, ("'hidden_act'", "'gelu'", "'silu'")),
        ({"hidden_act": ["silu"]}, ("'hidden_act'",)),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ("rope_scaling", "'yarn'", "4.0", "scaling")),
        ({"rope_scaling": 2.0}, ("'rope_scaling'",)),
        (
            {"rope_parameters": {"rope_type": "yarn"}, "rope_theta": None},
            ("rope_parameters", "'rope_type'", "'yarn'", "'default'"),
        ),
        ({"rope_parameters": {"type": "linear"}}, ("rope_parameters", "'type'", "'linear'", "'default'")),
        ({"rope_parameters": {"rope_theta": -1}}, ("rope_parameters", "'rope_theta'", "-1")),
        ({"rope_parameters": [1e4]}, ("'rope_parameters'", "object")),
        ({"layers_block_type": ["hybrid", "attention"]}, ("'layers_block_type'", "hybrid")),
        ({"layer_types": ["full_attention"]}, ("'layer_types'", "hybrid")),
        ({"layer_types": "hybrid"}, ("'layer_types'",)),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 1.0, "attention_factor": 2.0}},
            ("'attention_factor'", "2.0"),
        ),
        ({"rope_scaling": {"type": "linear", "factor": True}}, ("'type'", "'linear'")),
        (
            {"rope_scaling": {"type": "linear", "factor": 1.0, "partial_rotary_factor": 0.5}},
            ("'partial_rotary_factor'",),
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 1.0, "short_factor": [1.0], "long_factor": [2.0]}},
            ("'long_factor'", "2.0"),
        ),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 1.0}}, ("'short_factor'",)),
        ({"fusion_config": True}, ("'fusion_config'",)),
        ({"auto_map": {"AutoConfig": "code.Config"}}, ("'auto_map'", "never runs remote code")),
        ({"dtype": "x"}, ("'dtype'", "'x'", "floating-point")),
        ({"torch_dtype": 5}, ("'torch_dtype'", "5", "floating-point")),
        ({"rope_parameters": []}, ("'rope_parameters'", "an object")),
        ({"mamba_expand": "2"}, ("'mamba_expand'", "whole number")),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 1.0}}, ("'rope_type'", "'dynamic'")),
        ({"rope_parameters": {"hybrid": {"rope_theta": 5.0}}}, ("'hybrid'", "all layers")),
        ({"is_causal": False}, ("'is_causal'", "ahead", "true")),
        ({"is_causal": 1}, ("'is_causal'",)),
        ({"per_layer_config": {"0": {"rms_norm_eps": 0.1}}}, ("'per_layer_config'", "all layers")),
        ({"text_config": {"hidden_size": 8}}, ("'text_config'",)),
        ({"transformers_weights": "other.safetensors"}, ("'transformers_weights'", "other.safetensors")),
        ({"hidden_act": "x" * 10_000}, ("'hidden_act'", "xxx...")),
        ({"auto_map": {"AutoModel": "code.Model"}}, ("'auto_map'", "never runs remote code")),
    ],
)
def test_what_is_not_exported(changes: dict[str, Any], mentioned: tuple[str, ...], released: dict[str, Any]) -> None:
    refused(released | changes, *mentioned)


@pytest.mark.parametrize(
    ("changes", "key", "figure"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads", "divide num_attention_heads"),
        ({"num_key_value_heads": 16}, "num_key_value_heads", "divide num_attention_heads"),
        ({"head_dim": 63}, "head_dim", "63"),
        ({"head_dim": None, "hidden_size": 1000}, "head_dim", "125"),
        ({"mamba_d_head": 32}, "mamba_d_head", "768"),
        ({"mamba_d_head": "auto", "mamba_n_heads": 25}, "mamba_d_head", "1525"),
        ({"mamba_d_ssm": None, "mamba_expand": 2}, "mamba_d_head", "2048"),
        ({"mamba_d_ssm": 8, "mamba_d_head": "auto"}, "mamba_d_head", "24"),
        ({"mamba_n_groups": 5}, "mamba_n_groups", "divide mamba_n_heads"),
        ({"mamba_d_conv": 1}, "mamba_d_conv", "two taps"),
    ],
)
def test_models_that_cannot_exist(changes: dict[str, Any], key: str, figure: str, released: dict[str, Any]) -> None:
    refused(released | changes, f"{key!r}", figure, "cannot exist")


@pytest.mark.parametrize("config", [None, [], "falcon_h1", 1, True, {}, [{"model_type": "falcon_h1"}]], ids=str)
def test_not_a_config_at_all(config: object) -> None:
    refused(config)


BROKEN_FILES: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"model_type": "falcon_h1", ',
    "two values": b"{} {}",
    "not utf-8": b'{"model_type": "\xff"}',
    "utf-16": '{"model_type": "falcon_h1"}'.encode("utf-16"),
    "too deep": b"[" * 200_000,
    "an integer of 5000 digits": b'{"model_type": "falcon_h1", "vocab_size": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_files_that_are_not_json(name: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(BROKEN_FILES[name])
    with pytest.raises(H1ExportError, match=r"not readable as JSON.*; download") as caught:
        FalconH1Config.load(tmp_path)
    assert str(caught.value).startswith(str(file))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(H1ExportError, match=r"config\.json: no such file; give a checkpoint folder"):
        FalconH1Config.load(tmp_path)


def test_a_folder_in_the_files_place(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(H1ExportError, match=r"config\.json: cannot be read"):
        FalconH1Config.load(tmp_path)


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("x", encoding="utf-8")
    with pytest.raises(H1ExportError, match=r"config\.json: cannot be read"):
        FalconH1Config.load(tmp_path / "model")


def test_nan_and_infinity_in_the_file_are_refused_too(released: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(released | {"key_multiplier": math.nan}), encoding="utf-8")
    with pytest.raises(H1ExportError, match="key 'key_multiplier' is nan"):
        FalconH1Config.load(tmp_path)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "silu", TOO_LARGE_FOR_A_FLOAT, -TOO_LARGE_FOR_A_FLOAT]),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(["__float__", "rope_theta", "rope_type", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def spec_or_error(config_of: Callable[..., FalconH1Config], changes: dict[str, Any]) -> FalconH1Config | H1ExportError:
    try:
        return config_of(**changes)
    except H1ExportError as error:
        return error


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.sampled_from(sorted(USED_KEYS - {"model_type"} | IGNORED_KEYS.keys() | JUDGED_KEYS)),
        JSON_VALUES,
        min_size=1,
        max_size=3,
    )
)
def test_random_values_give_a_spec_or_the_one_error(
    config_of: Callable[..., FalconH1Config], changes: dict[str, Any]
) -> None:
    """Values go through JSON text first, so that they are exactly what a file can hold."""
    found = spec_or_error(config_of, json.loads(json.dumps(changes)))
    if isinstance(found, H1ExportError):
        assert any(key in str(found) for key in USED_KEYS | JUDGED_KEYS)
        assert found.next_step
    else:
        assert found.mamba_n_heads * found.mamba_d_head == found.mamba_d_ssm
        assert min(found.in_proj_parts) > 0
        assert all(
            0 < x < math.inf
            for x in (*found.ssm_multipliers, *found.mlp_multipliers, found.rope_theta, found.rms_norm_eps)
        )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(JSON_VALUES)
def test_random_files_give_the_one_error(value: Any) -> None:
    with pytest.raises(H1ExportError):
        FalconH1Config.from_config(json.loads(json.dumps(value)))
