"""AWQ and compressed-tensors: keys judged by meaning, values equal to those of the writers and their libraries."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from gptq_files import LAYOUTS, Gptq, Tensors, Written, edit, write_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from h1export.checkpoint.awq_format import AwqFormat
from h1export.checkpoint.compressed_format import CompressedFormat
from h1export.checkpoint.packed_formats import format_from_config, open_matrix
from h1export.checkpoint.safetensors_header import read_header
from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config

NAME = "x.weight"
OUT_PROJ = "model.layers.0.mamba.out_proj"
RECORDED = Path(__file__).parent / "packed"  # by tools/record_packed.py


def opened(folder: Path, shape: tuple[int, int], config: dict[str, Any], file: str = "model.safetensors") -> Any:
    entries = {entry.name: entry for entry in read_header(folder / file)}
    return open_matrix(NAME, shape, format_from_config(config), entries=entries)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    layout=st.sampled_from(["gptq", "awq", "compressed"]),
    bits=st.sampled_from([4, 8]),
    sym=st.booleans(),
    v2=st.booleans(),
    group=st.sampled_from([32, 64, -1]),
    act_order=st.booleans(),
    rows=st.sampled_from([8, 11, 22, 40]),
    columns=st.sampled_from([64, 192]),
    start=st.integers(0, 39),
    count=st.integers(1, 24),
    seed=st.integers(0, 999),
)
def test_every_value_is_the_writers(
    layout: str,
    bits: int,
    sym: bool,
    v2: bool,
    group: int,
    act_order: bool,
    rows: int,
    columns: int,
    start: int,
    count: int,
    seed: int,
) -> None:
    if layout == "awq":
        rows = -(-rows // 8) * 8
        bits, act_order = 4, False
    how = Gptq(bits=bits, group=group, sym=sym, v2=v2, act_order=act_order, seed=seed, layout=layout)
    with tempfile.TemporaryDirectory() as folder:
        weight = np.random.default_rng(seed).standard_normal((rows, columns))
        written = write_tensors({NAME: weight}, Path(folder), how)
        matrix = opened(Path(folder), (rows, columns), LAYOUTS[layout][0](how))
        middle = 1 << (bits - 1)
        stop = min(start + count, rows)
        start = min(start, stop - 1)
        np.testing.assert_array_equal(matrix.codes(start, stop).astype(int) + middle, written.codes[NAME][start:stop])
        np.testing.assert_array_equal(matrix.zeros(start, stop).astype(int) + middle, written.zeros[NAME][start:stop])
        np.testing.assert_array_equal(matrix.scales(start, stop), written.scales[NAME][start:stop])
        np.testing.assert_array_equal(matrix.dense(start, stop), written.weight(NAME)[start:stop])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("shape", [(24, 64), (11, 96)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_compressed_tensors_own_compressor(
    bits: int, symmetric: bool, group: int | None, shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    """The library packs a weight, and its own dequantisation is ours."""
    strategy = "channel" if group is None else "group"
    arguments = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    torch.manual_seed(bits)
    rows, columns = shape
    groups = 1 if group is None else columns // group
    scale = (0.01 + 0.02 * torch.rand(rows, groups)).half().to(dtype)
    state = {"weight": 0.1 * torch.randn(rows, columns).to(dtype), "weight_scale": scale}
    top = 1 << (bits - 1)
    state["weight_zero_point"] = torch.zeros(rows, groups, dtype=torch.int8)
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-top, top, (rows, groups)).to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    packed = compressor.compress(state, scheme)
    truth = compressor.decompress(packed | {"weight_scale": scale.float()}, scheme)["weight"]
    save_file({f"x.{part}": tensor for part, tensor in packed.items()}, tmp_path / "model.safetensors")
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
    }
    matrix = opened(tmp_path, shape, config)
    np.testing.assert_array_equal(matrix.dense(0, rows), truth.numpy())
    assert (matrix.packed_format.bits, matrix.packed_format.sym) == (bits, symmetric)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", [32, -1])
def test_signed_zero_points_that_are_not_packed(bits: int, sym: bool, group: int, tmp_path: Path) -> None:
    """As older releases of compressed-tensors wrote them, zeros of symmetric weights included."""
    how = Gptq(bits=bits, group=group, sym=sym, layout="compressed")
    written = write_tensors({NAME: np.random.default_rng(0).standard_normal((11, 64))}, tmp_path, how)
    middle = 1 << (bits - 1)
    signed = (written.zeros[NAME] - middle).astype(np.int8)
    edit(tmp_path, lambda tensors: tensors.update({"x.weight_zero_point": signed}))
    config = LAYOUTS["compressed"][0](how)
    matrix = opened(tmp_path, (11, 64), config)
    np.testing.assert_array_equal(matrix.zeros(3, 9), signed[3:9])
    np.testing.assert_array_equal(matrix.dense(0, 11), written.weight(NAME))
    wrong = np.full_like(signed, 1 if sym else -9)
    edit(tmp_path, lambda tensors: tensors.update({"x.weight_zero_point": wrong}))
    if sym or bits == 4:
        with pytest.raises(H1ExportError, match="zero points") as caught:
            opened(tmp_path, (11, 64), config).dense(0, 11)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zero_points", [True, False])
def test_autoawqs_own_dequantisation(zero_points: bool) -> None:
    """AutoAWQ wrote the file, and has dequantised it in float32."""
    file = f"autoawq-{'asymmetric' if zero_points else 'symmetric'}.safetensors"
    found = load_file(RECORDED / file)
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": zero_points, "version": "gemm"}
    truth = found["dequantised"].numpy()
    matrix = opened(RECORDED, truth.shape, config, file)
    np.testing.assert_array_equal(matrix.dense(0, len(truth)), truth)


AWQ = LAYOUTS["awq"][0](Gptq(group=128))
COMPRESSED = LAYOUTS["compressed"][0](Gptq(group=128))


def test_formats() -> None:
    assert format_from_config(AWQ) == AwqFormat(4, 128, True)
    assert format_from_config(COMPRESSED) == CompressedFormat(4, 128, True)
    assert format_from_config({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}) == AwqFormat(
        4, 64, False
    )


def nested(**weights: Any) -> dict[str, Any]:
    group = COMPRESSED["config_groups"]["group_0"]
    return {"config_groups": {"group_0": group | {"weights": group["weights"] | weights}}}


@pytest.mark.parametrize(
    ("config", "change", "mentioned"),
    [
        (AWQ, {"version": "gemv"}, "'gemv'"),
        (AWQ, {"version": "exllama"}, "'exllama'"),
        (AWQ, {"bits": 8}, "4"),
        (AWQ, {"sym": False}, "contradicts"),
        (AWQ, {"shift": 1}, "'shift'"),
        (AWQ, {"group_size": 0}, "group_size"),
        (COMPRESSED, {"format": "float-quantized"}, "'float-quantized'"),
        (COMPRESSED, {"format": "marlin-24"}, "'marlin-24'"),
        (COMPRESSED, {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (COMPRESSED, {"transform_config": {"x": 1}}, "transform_config"),
        (COMPRESSED, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (COMPRESSED, {"config_groups": {}}, "config_groups"),
        (COMPRESSED, {"config_groups": {"a": 3}}, "weights"),
        (COMPRESSED, {"config_groups": {"W8A8": ["Linear"]}}, "weights"),
        (COMPRESSED, nested(type="float"), "'type'"),
        (COMPRESSED, nested(num_bits=3), "num_bits"),
        (COMPRESSED, nested(strategy="tensor"), "'tensor'"),
        (COMPRESSED, nested(dynamic=True), "dynamic"),
        (COMPRESSED, nested(a_new_key=1), "a_new_key"),
    ],
    ids=str,
)
def test_what_is_refused(config: dict[str, Any], change: dict[str, Any], mentioned: str) -> None:
    with pytest.raises(H1ExportError) as caught:
        format_from_config(config | change, "config.json: quantization_config")
    assert mentioned in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.next_step


@pytest.mark.parametrize(
    "method",
    [
        "bitsandbytes",
        "fp8",
        "fbgemm_fp8",
        "hqq",
        "quanto",
        "eetq",
        "torchao",
        "mxfp4",
        "aqlm",
        "auto-round",
        None,
        4,
        [],
    ],
    ids=str,
)
def test_methods_that_are_not_read(method: Any) -> None:
    with pytest.raises(H1ExportError, match=r"quant_method.*(unquantised|export it)") as caught:
        format_from_config({"quant_method": method, "bits": 4})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["awq", "compressed"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("autoround_version", "0.9"),
        ("provider", "x"),
        ("a_new_key", None),
        ("a_new_key", []),
        ("a_new_key", {}),
        ("version_of_nothing", None),
    ],
)
def test_keys_that_say_nothing(layout: str, key: str, value: Any) -> None:
    config = LAYOUTS[layout][0](Gptq())
    assert format_from_config(config | {key: value}) == format_from_config(config)


def drop(part: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(f"{OUT_PROJ}.{part}")


def replace(part: str, change: Callable[[Any], Any]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({f"{OUT_PROJ}.{part}": change(tensors[f"{OUT_PROJ}.{part}"])})


@pytest.mark.parametrize(
    ("layout", "damage", "mentioned"),
    [
        ("awq", drop("qzeros"), "missing"),
        ("awq", drop("scales"), "missing"),
        ("awq", replace("qweight", lambda t: t[1:]), "shape"),
        ("awq", replace("qzeros", lambda t: t[:, 1:]), "shape"),
        ("awq", replace("qweight", lambda t: t.view(np.float32)), "'F32'"),
        ("compressed", drop("weight_scale"), "missing"),
        ("compressed", drop("weight_shape"), "missing"),
        ("compressed", drop("weight_zero_point"), "missing"),
        ("compressed", drop("weight_packed"), "missing"),
        ("compressed", replace("weight_shape", lambda t: t[::-1]), "weight_shape"),
        ("compressed", replace("weight_packed", lambda t: t[:, 1:]), "shape"),
        ("compressed", replace("weight_scale", lambda t: t.astype(np.int32)), "'I32'"),
        ("compressed", replace("weight_g_idx", lambda t: t + 1), "weight_g_idx"),
        ("compressed", replace("weight_g_idx", lambda t: np.where(np.arange(len(t)) == 3, -1, t)), "from -1"),
        ("compressed", replace("weight_g_idx", lambda t: t * 0), "different sizes"),
    ],
)
def test_a_damaged_checkpoint(
    layout: str,
    damage: Callable[[Tensors], object],
    mentioned: str,
    make_gptq: Callable[..., Written],
    tmp_path: Path,
) -> None:
    folder = make_gptq(tmp_path, layout=layout, sym=False, act_order=layout == "compressed").folder
    edit(folder, damage)
    with pytest.raises(H1ExportError, match=mentioned) as caught:
        WeightStore.open(folder, FalconH1Config.load(folder))
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)
