"""What llama.cpp would compute wrongly is refused by name, before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from h1export.checkpoint.store import WeightStore
from h1export.commands.build import build_artifact
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.quantize.scheme import QuantScheme
from h1export.targets.gguf.options import GgufOptions
from h1export.targets.gguf.refuse import REFUSED, check_model

Changed = Callable[..., FalconH1Config]
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e11}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "norm before the gate": ("mamba_norm_before_gate", {"mamba_rms_norm": True, "mamba_norm_before_gate": True}),
    "upper limit of the time step": ("time_step_limit", {"time_step_limit": [0.0, 0.1]}),
    "lower limit of the time step": ("time_step_limit", {"time_step_limit": [1e-3, {"__float__": "Infinity"}]}),
    "biases of attention": ("attention_bias", {"attention_bias": True}),
    "bias of in_proj": ("mamba_proj_bias", {"mamba_proj_bias": True}),
    "bias of out_proj": ("projectors_bias", {"projectors_bias": True}),
    "scaled RoPE": ("rope_type", {"rope_parameters": YARN, "rope_theta": None}),
}


@pytest.mark.parametrize("name", list(CASES))
def test_a_model_is_refused_before_any_work(
    name: str, released: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*_: Any, **__: Any) -> None:
        pytest.fail("the weights were opened")

    monkeypatch.setattr(WeightStore, "open", unwanted)
    key, changes = CASES[name]
    (tmp_path / "config.json").write_text(json.dumps(released | changes))
    with pytest.raises(H1ExportError) as caught:
        build_artifact(tmp_path, "gguf", tmp_path / "out")
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_every_case_of_the_table_is_tried() -> None:
    assert {key for key, _ in CASES.values()} == {*REFUSED, "rope_type"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mamba_norm_before_gate": True},  # without a norm, it is before nothing
        {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_n_groups": 2},
        {"mlp_bias": True},
        {"mamba_conv_bias": False},
        {"tie_word_embeddings": True},
    ],
)
def test_other_models_are_taken(changes: dict[str, Any], config_of: Changed) -> None:
    check_model(config_of(**changes))


@pytest.mark.parametrize(
    ("options", "quant", "what"),
    [
        ({"head": "q6_k"}, "int4", 'tensor "lm_head.weight".*128 columns.*use --head f16'),
        ({"embedding": "q6_k"}, "int4", 'tensor "model.embed_tokens.weight".*use --embedding f16'),
    ],
)
def test_a_type_that_does_not_fit_is_refused(
    options: dict[str, Any], quant: Any, what: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(H1ExportError, match=what):
        build_artifact(
            make_checkpoint(), "gguf", tmp_path / "out", scheme=QuantScheme(quant), options=GgufOptions(**options)
        )
    assert not (tmp_path / "out").exists()


def test_rows_that_blocks_do_not_divide_are_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(intermediate_size=200)
    with pytest.raises(H1ExportError, match=r"down_proj.*200 columns.*--quant none --floats f16"):
        build_artifact(checkpoint, "gguf", tmp_path / "out", scheme=QuantScheme("int8"))


def test_fp16_has_no_place_for_large_weights(copy_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = copy_checkpoint(embedding_multiplier=1e7)
    options = GgufOptions(floats="f16")
    with pytest.raises(H1ExportError, match=r"embed_tokens.*too large for fp16"):
        build_artifact(checkpoint, "gguf", tmp_path / "out", scheme=QuantScheme("none"), options=options)
    with pytest.raises(H1ExportError, match=r"embed_tokens.*do not fit fp16"):
        build_artifact(copy_checkpoint_again(checkpoint, 1e9), "gguf", tmp_path / "out", scheme=QuantScheme("int8"))


def copy_checkpoint_again(checkpoint: Path, embedding_multiplier: float) -> Path:
    """Return the checkpoint with another multiplier in its config."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"embedding_multiplier": embedding_multiplier}))
    return checkpoint


def test_column_orders_and_zero_points_are_refused(make_gptq: Callable[..., Any], tmp_path: Path) -> None:
    ordered = make_gptq(tmp_path / "ordered", act_order=True)
    with pytest.raises(H1ExportError, match="order of its own"):
        build_artifact(ordered.folder, "gguf", tmp_path / "out", scheme=QuantScheme("none"))
    asymmetric = make_gptq(tmp_path / "asymmetric", sym=False)
    with pytest.raises(H1ExportError, match="zero points"):
        build_artifact(asymmetric.folder, "gguf", tmp_path / "out", scheme=QuantScheme("none"))
