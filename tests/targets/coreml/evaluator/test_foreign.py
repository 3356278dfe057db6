"""Packages made by coremltools' own torch front end run in the evaluator and match the module they were made from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from h1export.targets.coreml.evaluator import Evaluator, Package
from h1export.targets.coreml.evaluator.dtypes import BY_NAME

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:coremltools"),  # it renames outputs
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit"),
]
Arrays = dict[str, np.ndarray]
# fractions of the range of each output; in fp16 each weight and each intermediate result is off by up to 2^-11 of its
# size, and four of those make 2e-3
TOLERANCES = {"fp32": 1e-5, "fp16": 2e-3}
PRECISIONS = {"fp32": ct.precision.FLOAT32, "fp16": ct.precision.FLOAT16}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.down(F.gelu(self.up(x))), -1)


class Convolutions(nn.Module):
    """Convolutions followed by pooling.

    The first is fused with its batch norm; the second has a group per channel and padding on the left.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv1d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.deep = nn.Conv1d(8, 8, 4, groups=8, stride=2)
        self.norm.running_mean = torch.randn(8)
        self.norm.running_var = torch.rand(8) + 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool1d(F.silu(self.deep(F.pad(torch.relu(self.norm(self.wide(x))), (3, 0)))), 2)


class Attention(nn.Module):
    """Causal attention with 4 heads, as one op or as its parts."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.project = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (part.reshape(1, 6, 4, 4).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        if self.fused:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            mixed = torch.softmax((query @ key.transpose(-1, -2) / 2).masked_fill(~mask, -1e4), -1) @ value
        return self.out(mixed.transpose(1, 2).reshape(1, 6, 16))


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.norm = nn.LayerNorm(16)
        nn.init.normal_(self.norm.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.table(ids))


class Pieces(nn.Module):
    """Slices, concatenation, sorting and sums."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        joined = torch.cat([x[:, 1:, ::2], x[:, :-1, :4]], -1)
        values, indices = torch.topk(joined, 3, -1)
        return values, indices, torch.cumsum(joined, 1), x.flip(-1).mean(1), torch.where(x > 0, x, x.exp()).amax(-1)


class Counter(nn.Module):
    """A module with two states: a leaky sum, and the last half of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sum", torch.zeros(1, 8))
        self.register_buffer("last", torch.zeros(1, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sum.mul_(0.5)
        self.sum.add_(x)
        self.last[:, :4] = x[:, 4:]
        return self.sum * 2 + self.last


IDS = torch.tensor([[1, 3, 10, 0]], dtype=torch.int32)
STATELESS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "mlp": (Mlp, torch.randn(2, 16, generator=torch.Generator().manual_seed(1))),
    "convolutions": (Convolutions, torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(2))),
    "attention": (lambda: Attention(fused=True), torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(3))),
    "attention by parts": (
        lambda: Attention(fused=False),
        torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(4)),
    ),
    "embedding": (Embedding, IDS),
    "pieces": (Pieces, torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(5))),
}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def convert(
    module: nn.Module, x: torch.Tensor, precision: str, *, states: dict[str, tuple[int, ...]] | None = None
) -> Any:
    """Convert a module with one input ``x``, in the precision that it computes in."""
    dtype = np.int32 if x.dtype == torch.int32 else BY_NAME[precision].array.type
    return ct.convert(
        torch.jit.trace(module.eval(), x, check_trace=False),
        inputs=[ct.TensorType("x", shape=x.shape, dtype=dtype)],
        states=[
            ct.StateType(ct.TensorType(shape=shape, dtype=np.float16), name) for name, shape in (states or {}).items()
        ]
        or None,
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=PRECISIONS[precision],
        skip_model_load=True,
    )


def saved(model: Any, folder: Path) -> Evaluator:
    model.save(str(folder / "model.mlpackage"))
    return Evaluator(Package.open(folder / "model.mlpackage"))


def given(evaluator: Evaluator, x: torch.Tensor) -> Arrays:
    return {"x": x.numpy().astype(evaluator.function.inputs["x"].dtype.array)}


def close(found: np.ndarray, expected: torch.Tensor, precision: str) -> None:
    """Check the outputs; integers must be equal."""
    reference = expected.detach().numpy()
    assert found.shape == reference.shape
    tolerance = TOLERANCES[precision] * np.abs(reference).max() if expected.is_floating_point() else 0
    np.testing.assert_allclose(found.astype(np.float64), reference, rtol=0, atol=tolerance)


@pytest.mark.parametrize("precision", sorted(PRECISIONS))
@pytest.mark.parametrize("name", STATELESS)
def test_a_module(name: str, precision: str, tmp_path: Path) -> None:
    make, x = STATELESS[name]
    module = make()
    evaluator = saved(convert(module, x, precision), tmp_path)
    inputs = given(evaluator, x)
    module.double()
    expected = module(torch.from_numpy(inputs["x"]).double() if x.is_floating_point() else x)
    results = expected if isinstance(expected, tuple) else (expected,)
    found = evaluator.run(inputs)
    assert all(array.dtype in (BY_NAME[precision].array, np.int32) for array in found.values())
    for array, result in zip(found.values(), results, strict=True):
        close(array, result, precision)


@pytest.mark.parametrize("precision", sorted(PRECISIONS))
def test_a_module_with_states(precision: str, tmp_path: Path) -> None:
    """States are fp16 in both precisions; all numbers here are exact in fp16."""
    module = Counter()
    shapes = {name: tuple(buffer.shape) for name, buffer in module.named_buffers()}
    evaluator = saved(convert(module, torch.zeros(1, 8), precision, states=shapes), tmp_path)
    for buffer in module.buffers():  # tracing has changed them
        buffer.zero_()
    states = evaluator.initial_states()
    assert states.keys() == shapes.keys()
    for step in range(4):
        x = torch.arange(8.0).reshape(1, 8) + step
        (found,) = evaluator.run(given(evaluator, x), states).values()
        close(found, module(x), "fp32")
        for name, buffer in module.named_buffers():
            close(states[name], buffer, "fp32")


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.second = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.fixture(scope="module", params=sorted(PRECISIONS))
def two_layers(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, str]:
    """A module, its package, and the precision of the package."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = TwoLayers()
    return module, convert(module, torch.zeros(2, 64), request.param), request.param


def quantized(mode: str, dtype: str, **granularity: Any) -> Callable[[Any], Any]:
    config = cto.OptimizationConfig(
        cto.OpLinearQuantizerConfig(mode=mode, dtype=dtype, weight_threshold=0, **granularity)
    )
    return lambda model: cto.linear_quantize_weights(model, config)


def palettized(bits: int) -> Callable[[Any], Any]:
    config = cto.OptimizationConfig(cto.OpPalettizerConfig(mode="uniform", nbits=bits, weight_threshold=0))
    return lambda model: cto.palettize_weights(model, config)


COMPRESSIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "int4 by block": (
        quantized("linear_symmetric", "int4", granularity="per_block", block_size=32),
        "blockwise_shift_scale",
    ),
    "uint4 by block with offsets": (
        quantized("linear", "uint4", granularity="per_block", block_size=16),
        "blockwise_shift_scale",
    ),
    "int8 by channel": (quantized("linear_symmetric", "int8"), "blockwise_shift_scale"),
    "int8 with offsets": (quantized("linear", "int8", granularity="per_tensor"), "blockwise_shift_scale"),
    "3 bits of a table": (palettized(3), "lut_to_dense"),
}


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_compressed_weights(two_layers: tuple[nn.Module, Any, str], name: str, tmp_path: Path) -> None:
    """torch runs with the weights that coremltools reports as stored."""
    original, model, precision = two_layers
    compress, op = COMPRESSIONS[name]
    compressed = compress(model)
    evaluator = saved(compressed, tmp_path)
    assert [step.type for step in evaluator.function.block.walk()].count(f"constexpr_{op}") == 2
    stored = cto.get_weights_metadata(cto.decompress_weights(compressed), weight_threshold=0)
    weights = [meta.val for meta in stored.values() if meta.val.ndim == 2]
    module = copy.deepcopy(original)
    for layer, weight in zip((module.first, module.second), weights, strict=True):
        assert (
            0 < np.abs(weight - layer.weight.detach().numpy()).max() < 0.1
        )  # the module is the right one, and its weights have changed
        layer.weight = nn.Parameter(torch.from_numpy(weight.astype(np.float32)))
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(6))
    (found,) = evaluator.run(given(evaluator, x)).values()
    close(found, module(x), precision)
