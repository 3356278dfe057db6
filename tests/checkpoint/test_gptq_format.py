"""quantization_config: each key is read, ignored for a stated reason, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from h1export.checkpoint.gptq_format import GptqFormat
from h1export.checkpoint.packed_formats import format_from_config, ignored_packed_keys, load_format
from h1export.errors import H1ExportError

# as GPTQModel, AutoGPTQ and transformers write it
GPTQMODEL = {
    "bits": 4,
    "checkpoint_format": "gptq",
    "desc_act": False,
    "dynamic": {"-:.*lm_head.*": {}},
    "group_size": 128,
    "hyb_act": False,
    "lm_head": False,
    "meta": {
        "quantizer": ["gptqmodel:2.2.0"],
        "damp_percent": 0.05,
        "static_groups": False,
        "true_sequential": True,
        "mse": 0.0,
    },
    "pack_dtype": "int32",
    "quant_method": "gptq",
    "sym": True,
}
AUTOGPTQ = {
    "bits": 8,
    "damp_percent": 0.01,
    "desc_act": True,
    "group_size": -1,
    "is_marlin_format": False,
    "model_file_base_name": "model",
    "model_name_or_path": None,
    "quant_method": "gptq",
    "static_groups": False,
    "sym": False,
    "true_sequential": True,
}
TRANSFORMERS = {
    "backend": "auto",
    "batch_size": 1,
    "bits": 4,
    "block_name_to_quantize": None,
    "cache_block_outputs": True,
    "checkpoint_format": "gptq_v2",
    "damp_percent": 0.1,
    "dataset": None,
    "format": "gptq_v2",
    "max_input_length": None,
    "modules_in_block_to_quantize": None,
    "quant_method": "gptq",
    "tokenizer": None,
}


AUTOROUND = {
    "amp": True,
    "autoround_version": "0.9.1",
    "batch_size": 8,
    "bits": 4,
    "block_name_to_quantize": "model.layers",
    "damp_percent": 0.01,
    "data_type": "int",
    "desc_act": False,
    "enable_quanted_input": True,
    "extra_config": {"lm_head": {"bits": 16, "data_type": "float"}, "x": {"bits": 4}},
    "group_size": 128,
    "iters": 200,
    "lm_head": False,
    "low_gpu_mem_usage": True,
    "nsamples": 512,
    "provider": "auto-round",
    "quant_method": "gptq",
    "seqlen": 2048,
    "sym": True,
    "true_sequential": False,
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "observer": "minmax"}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}
GPTQMODEL_7 = GPTQMODEL | {"method": "gptq", "format": "gptq", "activation": None, "rotation": None}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPTQMODEL, GptqFormat(4, 128, True, zero_offset=1)),
        (GPTQMODEL_7, GptqFormat(4, 128, True, zero_offset=1)),
        (AUTOROUND, GptqFormat(4, 128, True, zero_offset=1)),
        (AUTOGPTQ, GptqFormat(8, -1, False, zero_offset=1)),
        (TRANSFORMERS, GptqFormat(4, 128, True, zero_offset=0)),
    ],
    ids=["gptqmodel", "gptqmodel 7", "autoround", "autogptq", "transformers"],
)
def test_what_writers_write(config: dict[str, Any], expected: GptqFormat) -> None:
    assert format_from_config(config) == expected


@pytest.mark.parametrize(
    ("config", "ignored"),
    [
        (GPTQMODEL, "desc_act hyb_act lm_head meta"),
        (GPTQMODEL_7, "desc_act hyb_act lm_head meta"),
        (
            AUTOROUND,
            "amp autoround_version batch_size block_name_to_quantize damp_percent desc_act enable_quanted_input iters "
            "lm_head low_gpu_mem_usage nsamples provider seqlen true_sequential",
        ),
        (TRANSFORMERS, "backend batch_size cache_block_outputs damp_percent"),
        (
            AWQ | {"modules_to_not_convert": ["x"], "autoround_version": "0.9"},
            "autoround_version modules_to_not_convert",
        ),
        (
            COMPRESSED | {"ignore": ["lm_head"], "version": "0.13"},
            "config_groups.group_0.weights.observer ignore version",
        ),
    ],
    ids=["gptqmodel", "gptqmodel 7", "autoround", "transformers", "awq", "compressed-tensors"],
)
def test_what_is_ignored_is_named(config: dict[str, Any], ignored: str, tmp_path: Path) -> None:
    """Keys that are read, and values that say nothing, are not named."""
    config = config | {"a_new_key": None, "another": {}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    assert ignored_packed_keys(tmp_path) == tuple(ignored.split())


@pytest.mark.parametrize(
    ("change", "mentioned"),
    [
        ({"quant_method": "bitsandbytes"}, ("'bitsandbytes'", "unquantised")),
        ({"quant_method": None}, ("'None'",)),
        ({"bits": 2}, ("'bits'", "2", "4 or 8")),
        ({"bits": 3}, ("'bits'", "3", "4 or 8")),
        ({"bits": "4"}, ("'bits'", "'4'")),
        ({"bits": True}, ("'bits'", "True")),
        ({"group_size": 0}, ("'group_size'", "0")),
        ({"group_size": -2}, ("'group_size'", "-2")),
        ({"group_size": 32.0}, ("'group_size'", "32.0")),
        ({"sym": "yes"}, ("'sym'", "true or false")),
        ({"checkpoint_format": "marlin"}, ("'checkpoint_format'", "'marlin'", "gptq_v2")),
        ({"format": "bitblas"}, ("'format'", "'bitblas'")),
        ({"format": "gptq_v2"}, ("'format'", "differs")),
        ({"format": ["gptq"]}, ("'format'",)),
        ({"pack_dtype": "int64"}, ("'pack_dtype'", "'int64'")),
        ({"is_marlin_format": True}, ("'is_marlin_format'",)),
        ({"dynamic": {"+:.*q_proj.*": {"bits": 8}}}, ("'dynamic'", "same for all")),
        ({"dynamic": ["-:x"]}, ("'dynamic'",)),
        ({"adapter": {"rank": 8}}, ("'adapter'",)),
        ({"rotation": "hadamard"}, ("'rotation'",)),
        ({"method": "awq"}, ("'method'", "'awq'")),
        ({"act_bits": 8}, ("'act_bits'",)),
        ({"super_bits": 6}, ("'super_bits'",)),
        ({"data_type": "mx_fp"}, ("'data_type'",)),
        ({"extra_config": {"x": {"bits": 8}}}, ("'extra_config'", "'x'")),
        ({"sparsity": 0.5}, ("'sparsity'", "unknown")),
    ],
    ids=str,
)
def test_what_is_refused(change: dict[str, Any], mentioned: tuple[str, ...]) -> None:
    with pytest.raises(H1ExportError) as caught:
        format_from_config(GPTQMODEL | change, "config.json: quantization_config")
    assert str(caught.value).startswith("config.json: quantization_config")
    assert all(text in str(caught.value) for text in mentioned), caught.value
    assert caught.value.next_step


@pytest.mark.parametrize("config", [[], "gptq", 4, {}], ids=str)
def test_what_is_no_description(config: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(H1ExportError, match="quantization_config"):
        load_format(tmp_path)


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}], ids=str)
def test_a_checkpoint_in_floats(config: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_format(tmp_path) is None
