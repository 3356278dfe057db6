"""GPTQ folders: the integers of every other target, in the layout that engines load, read back bit for bit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gptq_files import Written
from safetensors.torch import load_file

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.store import WeightStore
from h1export.commands.build import build_artifact
from h1export.commands.load import load_runner
from h1export.commands.plan import plan_build
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.tensors import EMBEDDING, LM_HEAD, projection_of, tensor_shapes
from h1export.quantize.methods import tune, tuned_values
from h1export.quantize.scheme import QuantScheme
from h1export.targets.gptq.options import GptqOptions

Build = Callable[..., Artifact]
PARTS = {"mamba": ".mamba.", "attention": ".self_attn.", "mlp": ".feed_forward.", "head": "lm_head"}
EIGHTS = {"mamba_n_heads": 8, "mamba_d_ssm": 256, "vocab_size": 264}  # all rows fill words of 8 codes


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("model-*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("method", ["rtn", "search", "awq", "gptq", "search+round+scales"])
def test_the_integers_are_those_of_onnx_runtime(
    method: str, make_spoken: Callable[..., Path], build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned_values, "STEPS", {"round": 2, "scales": 2})
    monkeypatch.setattr(tune, "STEPS", {"round": 2, "scales": 2})
    checkpoint = make_spoken(**EIGHTS)
    mine = load_runner(build(checkpoint, "int4", method=method, target="gptq")).stored_weights()
    theirs = load_runner(build(checkpoint, "int4", method=method), kernels="stock").stored_weights()
    assert set(theirs) - set(mine) == {EMBEDDING}
    for name in mine:
        one, other = mine.quantized(name), theirs.quantized(name)  # type: ignore[attr-defined]
        assert np.array_equal(one.codes, other.codes), name
        assert np.array_equal(one.scales, other.scales), name
        assert np.array_equal(mine[name], theirs[name]), name


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_the_words_are_those_of_the_format(quant: str, make_checkpoint: Callable[..., Path], build: Build) -> None:
    """By the format's definition, with none of our reader's code."""
    artifact = build(make_checkpoint(**EIGHTS), quant, target="gptq")
    bits = int(quant[3:])
    tensors = tensors_of(artifact.folder)
    stored = load_runner(artifact).stored_weights()
    config = json.loads((artifact.folder / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"]) == (bits, 32 if bits == 4 else -1, True)
    for name in stored:
        qweight, qzeros, scales, g_idx = (
            tensors[name.removesuffix("weight") + part].numpy() for part in ("qweight", "qzeros", "scales", "g_idx")
        )
        dtypes = [array.dtype for array in (qweight, qzeros, scales, g_idx)]
        assert dtypes == [np.int32, np.int32, np.float16, np.int32]
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        codes = (qweight.view(np.uint32)[:, None, :] >> shifts[None, :, None] & (2**bits - 1)).reshape(len(g_idx), -1)
        zeros = (qzeros.view(np.uint32)[:, :, None] >> shifts & (2**bits - 1)).reshape(len(qzeros), -1) + 1
        weight = scales[g_idx].astype(np.float32) * (codes.astype(np.int64) - zeros[g_idx])
        assert np.array_equal(weight.T, stored[name]), name


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"sym": False},
        {"sym": False, "act_order": True},
        {"bits": 8, "act_order": True, "head": True},
        {"bits": 8, "group": -1, "sym": False},
        {"v2": True, "sym": False},
        {"layout": "awq", "sym": False},
        {"layout": "compressed"},
    ],
    ids=lambda how: "-".join(f"{key}={value}" for key, value in how.items()) or "plain",
)
def test_a_prequantized_checkpoint_keeps_every_integer(
    how: dict[str, Any], make_gptq: Callable[..., Written], tmp_path: Path
) -> None:
    written = make_gptq(tmp_path / "checkpoint", **how)
    artifact = build_artifact(written.folder, "gptq", tmp_path / "out", scheme=QuantScheme("none"))
    config = artifact.config
    source = WeightStore.open(written.folder, config)
    again = WeightStore.open(artifact.folder, config)
    assert again.packed.keys() == source.packed.keys() == written.codes.keys()
    for name, matrix in source.packed.items():
        rows, mine = matrix.shape[0], again.packed[name]
        assert np.array_equal(mine.codes(0, rows), matrix.codes(0, rows)), name
        assert np.array_equal(mine.dense(0, rows), matrix.dense(0, rows)), name
        assert np.array_equal(mine.zeros(0, rows)[:, mine.group_of], matrix.zeros(0, rows)[:, matrix.group_of]), name


@pytest.mark.parametrize("unpacked", [(), ("mamba",), ("head",), ("attention", "mlp"), ("mamba", "head")], ids="-".join)
def test_the_packed_set_is_what_was_asked_for(
    unpacked: tuple[str, ...], make_checkpoint: Callable[..., Path], build: Build
) -> None:
    checkpoint = make_checkpoint(**EIGHTS)
    artifact = build(checkpoint, "int4", target="gptq", unpacked=unpacked)
    source = load_file(checkpoint / "model.safetensors")
    tensors = tensors_of(artifact.folder)
    quantization = json.loads((artifact.folder / "config.json").read_text())["quantization_config"]
    for name in tensor_shapes(artifact.config):
        matrix = projection_of(name) is not None and name != EMBEDDING
        packed = matrix and not any(PARTS[part] in name for part in unpacked)
        module = name.removesuffix(".weight")
        assert (f"{module}.qweight" in tensors) == packed
        assert (name in tensors) != packed
        if not packed:
            assert torch.equal(tensors[name], source[name])  # its dtype too
        if matrix and name != LM_HEAD:  # as GPTQModel and vLLM match the rules
            excluded = any(re.match(rule.removeprefix("-:"), module) for rule in quantization.get("dynamic", {}))
            assert excluded != packed
    assert quantization["lm_head"] == ("head" not in unpacked)


def test_single_layers_can_stay_floats(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Their rules exclude those layers alone: model.layers.1 is not model.layers.10."""
    kept = ("model.layers.1.mlp", "model.layers.1.self_attn.q_proj.weight")
    scheme = QuantScheme("int4", chosen={kept[1]: "none"})
    checkpoint = make_checkpoint(**EIGHTS, num_hidden_layers=11)
    artifact = build_artifact(checkpoint, "gptq", tmp_path / "out", scheme=scheme)
    rules = json.loads((artifact.folder / "config.json").read_text())["quantization_config"]["dynamic"]
    modules = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(11) for name in "qkvo"]
    excluded = [name for name in modules if any(re.match(rule.removeprefix("-:"), name) for rule in rules)]
    assert excluded == ["model.layers.1.self_attn.q_proj"]
    assert kept[1] in tensors_of(artifact.folder)


def test_rows_that_do_not_fill_words_stay_floats(tiny: Path, build: Build) -> None:
    artifact = build(tiny, "int4", target="gptq")
    assert len(artifact.manifest.weights) == 33
    text = (artifact.folder / "README.md").read_text()
    assert "- 4 x: its 1030 rows do not fill words of 8 codes" in text
    assert "- 1 x: the layout has no embeddings in integers" in text


@pytest.mark.parametrize(
    ("scheme", "options", "line"),
    [
        (QuantScheme("int4"), GptqOptions(unpacked=("mamba", "attention", "mlp", "head")), "no weight can be packed"),
        (
            QuantScheme("int4", chosen={"model.layers.0.mamba.out_proj.weight": "int8"}),
            GptqOptions(),
            'tensor "model.layers.0.self_attn.q_proj.weight": has another precision than '
            '"model.layers.0.mamba.out_proj.weight"',
        ),
    ],
    ids=["nothing", "mixed"],
)
def test_what_the_layout_cannot_say_is_refused(
    scheme: QuantScheme, options: GptqOptions, line: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(H1ExportError) as caught:
        build_artifact(make_checkpoint(), "gptq", tmp_path / "out", scheme=scheme, options=options)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_transformers_loads_a_folder_of_floats(make_checkpoint: Callable[..., Path], build: Build) -> None:
    from transformers import FalconH1ForCausalLM

    checkpoint = make_checkpoint()
    artifact = build(checkpoint, "none", target="gptq")
    assert "quantization_config" not in json.loads((artifact.folder / "config.json").read_text())
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        found, expected = (
            FalconH1ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits  # type: ignore[attr-defined]
            for folder in (artifact.folder, checkpoint)
        )
    assert torch.equal(found, expected)


def test_a_plan_has_the_sizes_and_two_builds_the_bytes(
    make_checkpoint: Callable[..., Path], build: Build, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(**EIGHTS)
    scheme = QuantScheme("int4")
    artifact = build(checkpoint, "int4", target="gptq")
    plan = plan_build(checkpoint, "gptq", tmp_path / "out", scheme=scheme)
    sizes = {name: size for name, (_, size) in artifact.manifest.files.items()}
    assert {name: size for name, size in plan.files.items() if name != "manifest.json"} == sizes
    again = build_artifact(checkpoint, "gptq", tmp_path / "out", scheme=scheme, jobs=2)
    assert again.manifest.files == artifact.manifest.files


def test_a_damaged_folder_is_an_error(make_checkpoint: Callable[..., Path], build: Build, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(build(make_checkpoint(**EIGHTS), "int4", target="gptq").folder, tmp_path / "out"))
    (shard,) = folder.glob("model-*.safetensors")
    data = bytearray(shard.read_bytes())
    data[200] = 0
    shard.write_bytes(data)
    with pytest.raises(H1ExportError, match=shard.name):
        load_runner(Artifact.open(folder))
