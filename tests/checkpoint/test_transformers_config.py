"""What transformers takes from a stranger's config.json and generation_config.json are values that do nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from odd_files import ODD, bounded
from released_config import RELEASED
from transformers import AttentionInterface, FalconH1Config, FalconH1ForCausalLM
from transformers.integrations import hub_kernels

from h1export.checkpoint.transformers_config import plain_config, plain_generation_config
from h1export.errors import H1ExportError

PLANTED: tuple[dict[str, Any], ...] = (
    {"attn_implementation": "planted/kernel"},
    {"_attn_implementation": "planted/kernel"},
    {"_attn_implementation_internal": "planted/kernel"},
    {"attn_implementation": "kernels-community/flash-attn3"},
    {"attn_implementation": {"": "planted/kernel"}},
    {"experts_implementation": "planted/kernel"},
    {"configuration_files": ["config.1.0.json"]},
    {"auto_map": {"AutoConfig": "planted.Planted"}},
    {"quantization_config": {"quant_method": "planted"}},
    {"to_dict": 7, "to_diff_dict": "x", "use_return_dict": 1},
    {"__class__": "x", "__dict__": {"hidden_size": 3}, "_auto_class": "planted"},
)


@pytest.mark.parametrize("planted", PLANTED, ids=range(len(PLANTED)))
def test_a_config_asks_for_nothing(planted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*names: Any, **_: Any) -> None:
        raise AssertionError(f"asks for {names}")

    for name in ("load_and_register_attn_kernel", "get_kernel", "lazy_load_kernel"):
        monkeypatch.setattr(hub_kernels, name, asked)
    (tmp_path / "config.1.0.json").write_text(json.dumps({**RELEASED, "hidden_size": 8}))
    small = {**RELEASED, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(small))
    plain = plain_config(tmp_path).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**small, **planted}))
    config = plain_config(tmp_path)
    assert config.to_dict() == plain
    model: Any = FalconH1ForCausalLM
    implementation = model(config).config._attn_implementation
    assert implementation in ("eager", "sdpa") or implementation in AttentionInterface()


def test_values_are_those_that_transformers_reads(tmp_path: Path) -> None:
    changed = {"time_step_limit": [0.0, {"__float__": "Infinity"}], "rope_theta": 77.0, "hidden_act": "silu"}
    (tmp_path / "config.json").write_text(json.dumps({**RELEASED, **changed}))
    kind: Any = FalconH1Config
    assert plain_config(tmp_path).to_dict() == kind.from_pretrained(tmp_path).to_dict()


@pytest.mark.parametrize("value", [{"vocab_size": "many"}, {"rope_parameters": 7}, {"id2label": "x" * 9999}])
def test_a_config_that_transformers_refuses_is_one_line(value: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**RELEASED, **value}))
    with pytest.raises(H1ExportError, match="transformers cannot use it") as caught:
        plain_config(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 300 + len(str(tmp_path / "config.json"))


OPTIONS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"temperature": 0.5, "top_k": 3}, ""),
    ({"custom_generate": "planted/repo", "trust_remote_code": True, "planted": [1]}, ""),
    ({"validate": 7, "update": 8, "__class__": 3, "to_dict": 1, "assistant_model": "planted"}, ""),
    ({"cache_implementation": "planted"}, "Invalid `cache_implementation`"),
    ({"compile_config": {"backend": "planted"}}, "compile_config"),
    ({"watermarking_config": {"planted": 1}}, "planted"),
    ({"num_return_sequences": 1 << 62}, "num_ret"),
)


@pytest.mark.parametrize(("found", "said"), OPTIONS, ids=range(len(OPTIONS)))
def test_options_of_generation(found: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(found))
    if said:
        with pytest.raises(H1ExportError, match=said):
            plain_generation_config(tmp_path)
        return
    options = plain_generation_config(tmp_path)
    assert (options.temperature, options.top_k) == (found.get("temperature"), found.get("top_k"))
    assert not {"custom_generate", "planted", "trust_remote_code", "assistant_model"} & vars(options).keys()
    assert type(options).__name__ == "GenerationConfig"


def test_no_options(tmp_path: Path) -> None:
    assert plain_generation_config(tmp_path) is None


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_is_no_file(name: str, odd: str, tmp_path: Path) -> None:
    ODD[odd](tmp_path / name)
    read = plain_config if name == "config.json" else plain_generation_config
    with bounded(), pytest.raises(H1ExportError, match=name):
        read(tmp_path)
