"""QuantScheme: which tensor gets which precision, and which widths a group divides."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import tensor_shapes
from h1export.quantize.choices import GROUP_SIZES, QuantName
from h1export.quantize.precision import Precision
from h1export.quantize.scheme import QuantScheme

LAYER_PROJECTIONS = (
    "mamba.in_proj.weight",
    "mamba.out_proj.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "feed_forward.gate_proj.weight",
    "feed_forward.up_proj.weight",
    "feed_forward.down_proj.weight",
)
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
EVERY_TENSOR = {
    "attention_bias": True,
    "mlp_bias": True,
    "projectors_bias": True,
    "mamba_proj_bias": True,
    "mamba_conv_bias": True,
    "mamba_rms_norm": True,
    "num_hidden_layers": 12,
}
INT8 = Precision(8, 0)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_the_precision_of_every_tensor(
    quant: QuantName, tied: bool, group_size: int, config_of: Callable[..., FalconH1Config]
) -> None:
    """Against a table written out here: projections and head, the embedding by its rule, and nothing else."""
    config = config_of(**EVERY_TENSOR, tie_word_embeddings=tied)
    int4 = Precision(4, group_size)
    projections, embedding = {"none": (None, None), "int8": (INT8, INT8), "int4": (int4, int4 if tied else INT8)}[quant]
    expected: dict[str, Precision | None] = dict.fromkeys(tensor_shapes(config))
    expected |= {f"model.layers.{layer}.{name}": projections for layer in range(12) for name in LAYER_PROJECTIONS}
    expected |= {EMBEDDING: embedding} | ({} if tied else {HEAD: projections})
    scheme = QuantScheme(quant, group_size)
    assert {name: scheme.precision(name, config) for name in tensor_shapes(config)} == expected


def test_the_default_is_int4_by_32(config_of: Callable[..., FalconH1Config]) -> None:
    assert QuantScheme() == QuantScheme("int4", 32)
    assert QuantScheme().precision(HEAD, config_of()) == Precision(4, 32)


@pytest.mark.parametrize(
    "name", ["", "mamba.norm.weight", "model.layers.0.mamba.conv1d.weight", "model.layers.0.mamba.in_proj.bias"]
)
def test_small_tensors_stay_float(name: str, config_of: Callable[..., FalconH1Config]) -> None:
    assert QuantScheme("int4").precision(name, config_of()) is None


def test_columns_per_group() -> None:
    assert Precision(4, 32).columns_per_group(96) == 32
    assert Precision(8, 0).columns_per_group(96) == 96


@pytest.mark.parametrize("quant", ["int2", "INT4", "", "fp16"])
def test_unknown_schemes(quant: str) -> None:
    with pytest.raises(H1ExportError, match=f"--quant: {quant!r} is unknown; one of none, int8, int4"):
        QuantScheme(quant)  # type: ignore[arg-type]


@pytest.mark.parametrize("group_size", [0, 16, 33, 256, -32])
def test_unknown_group_sizes(group_size: int) -> None:
    with pytest.raises(H1ExportError, match=f"--group-size: {group_size} is not a group size; one of 32, 64, 128"):
        QuantScheme("int4", group_size)


@pytest.mark.parametrize(
    ("changes", "group_size", "tensor", "width", "hint"),
    [
        ({"hidden_size": 96}, 64, "mamba.in_proj.weight", 96, "--group-size 32"),
        ({"intermediate_size": 192}, 128, "feed_forward.down_proj.weight", 192, "--group-size 64"),
        ({"intermediate_size": 160}, 64, "feed_forward.down_proj.weight", 160, "--group-size 32"),
        ({"intermediate_size": 2056}, 32, "feed_forward.down_proj.weight", 2056, "--quant int8"),
        ({"mamba_d_ssm": 24 * 6, "mamba_d_head": 6}, 32, "mamba.out_proj.weight", 144, "--quant int8"),
        ({"head_dim": 2}, 32, "self_attn.o_proj.weight", 16, "--quant int8"),
    ],
)
def test_widths_that_a_group_does_not_divide(
    changes: dict[str, int],
    group_size: int,
    tensor: str,
    width: int,
    hint: str,
    config_of: Callable[..., FalconH1Config],
) -> None:
    config = config_of(**changes, tie_word_embeddings=False)
    with pytest.raises(H1ExportError) as caught:
        QuantScheme("int4", group_size).check(config)
    message = str(caught.value)
    assert f'{tensor}"' in message or 'tensor "lm_head.weight"' in message
    assert f"{width} columns" in message
    assert f"groups of {group_size}" in message
    assert caught.value.next_step.endswith(hint)
    QuantScheme("int8", group_size).check(config)
    QuantScheme("none", group_size).check(config)


WIDTHS = st.integers(1, 12).map(lambda n: 16 * n)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    hidden=WIDTHS,
    mlp=WIDTHS,
    heads=st.integers(1, 12),
    head_dim=st.sampled_from([4, 8, 16, 32]),
    group_size=st.sampled_from(GROUP_SIZES),
)
def test_a_scheme_passes_exactly_where_its_group_size_divides_every_width(
    config_of: Callable[..., FalconH1Config], hidden: int, mlp: int, heads: int, head_dim: int, group_size: int
) -> None:
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_attention_heads": heads, "num_key_value_heads": 1}
    config = config_of(**sizes, head_dim=head_dim, num_hidden_layers=2)
    divided = all(width % group_size == 0 for width in (hidden, mlp, heads * head_dim, config.mamba_d_ssm))
    assert check_passes(QuantScheme("int4", group_size), config) == divided
    assert check_passes(QuantScheme("int8", group_size), config)


def check_passes(scheme: QuantScheme, config: FalconH1Config) -> bool:
    try:
        scheme.check(config)
    except H1ExportError:
        return False
    return True


def test_a_hinted_group_size_suits_every_tensor(config_of: Callable[..., FalconH1Config]) -> None:
    config = config_of(hidden_size=64 * 3, intermediate_size=32 * 5)
    assert math.gcd(config.hidden_size, config.intermediate_size, config.mamba_d_ssm, config.attention_dim) == 32
    with pytest.raises(H1ExportError) as caught:
        QuantScheme("int4", 128).check(config)
    assert caught.value.next_step == "use --group-size 32"
