"""The registration of the ops with PyTorch: schemas, fake kernels and dynamic sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.library import opcheck
from torch.utils._pytree import tree_map_only

from h1export.plugins import h1

Inputs = dict[str, Any]
Makers = dict[str, Callable[..., Inputs]]

OPS = ("ssm_scan", "causal_conv", "attention")
SIZES = {
    "ssm_scan": st.fixed_dictionaries(
        {
            name: st.integers(1, 5)
            for name in ("batch", "seq", "groups", "heads_per_group", "d_head", "d_state", "chunk_size")
        }
    ),
    "causal_conv": st.fixed_dictionaries(
        {name: st.integers(1, 5) for name in ("batch", "seq", "channels")}
        | {"taps": st.integers(2, 5), "bias": st.booleans()}
    ),
    "attention": st.fixed_dictionaries(
        {name: st.integers(1, 5) for name in ("batch", "seq", "kv_heads", "heads_per_kv")}
        | {"past": st.integers(0, 5), "dim": st.sampled_from([2, 4])}
    ),
}
# one ragged, padded case for each op
VARIANTS: dict[str, list[Inputs]] = {
    "ssm_scan": [
        {},
        {"seq": 1},
        {"chunk_size": 64},
        {"limits": (0.02, 0.3)},
        {"pads": (13,)},
        {"dtype": torch.bfloat16},
    ],
    "causal_conv": [{}, {"seq": 1}, {"bias": False}, {"taps": 2}, {"dtype": torch.bfloat16}],
    "attention": [{}, {"past": 0}, {"seq": 1}, {"heads_per_kv": 1}, {"pads": (9,)}, {"dtype": torch.bfloat16}],
}


@pytest.fixture(scope="session")
def make(
    scan_inputs: Callable[..., Inputs], conv_inputs: Callable[..., Inputs], attention_inputs: Callable[..., Inputs]
) -> Callable[..., Inputs]:
    """make(op, **sizes) -> its keyword arguments."""
    makers: Makers = {"ssm_scan": scan_inputs, "causal_conv": conv_inputs, "attention": attention_inputs}
    return lambda op, **sizes: makers[op](**sizes)


def call(op: str, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return tuple(getattr(h1, op)(**inputs))


def described(outputs: tuple[torch.Tensor, ...]) -> list[Any]:
    return [(tuple(tensor.shape), tensor.dtype) for tensor in outputs]


@pytest.mark.parametrize(("op", "sizes"), [(op, sizes) for op in OPS for sizes in VARIANTS[op]])
def test_opcheck(op: str, sizes: Inputs, make: Callable[..., Inputs]) -> None:
    """PyTorch's own checks pass: no mutation, no aliases, right fake kernels and dynamic shapes."""
    opcheck(getattr(h1, op).default, (), make(op, **sizes))


@pytest.mark.parametrize("op", OPS)
def test_opcheck_with_an_input_in_another_memory_order(op: str, make: Callable[..., Inputs]) -> None:
    inputs = make(op)
    first = next(iter(inputs))
    opcheck(getattr(h1, op).default, (), inputs | {first: inputs[first].transpose(0, 1).contiguous().transpose(0, 1)})


def test_opcheck_refuses_an_op_that_returns_its_input() -> None:
    """The checks find a planted alias."""

    @torch.library.custom_op("h1_test::alias", mutates_args=())
    def alias(x: torch.Tensor) -> torch.Tensor:
        return x

    with pytest.raises(Exception, match="alias"):
        opcheck(torch.ops.h1_test.alias.default, (torch.ones(2),))


@pytest.mark.parametrize("op", OPS)
def test_fake_outputs_are_like_the_real_ones(op: str, make: Callable[..., Inputs]) -> None:
    @settings(deadline=None, max_examples=30, derandomize=True)
    @given(sizes=SIZES[op], dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    def check(sizes: dict[str, Any], dtype: torch.dtype) -> None:
        inputs = make(op, **sizes, dtype=dtype)
        real = call(op, inputs)
        with FakeTensorMode() as mode:
            fake = call(op, tree_map_only(torch.Tensor, mode.from_tensor, inputs))
        meta = call(op, tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), inputs))
        assert described(fake) == described(real)
        assert described(meta) == described(real)
        assert {tensor.device.type for tensor in meta} == {"meta"}

    check()


ONES: dict[str, Inputs] = {
    "ssm_scan": {"d_head": 1, "groups": 1, "chunk_size": 64},
    "causal_conv": {"channels": 1},
    "attention": {"dim": 2},
}


@pytest.mark.parametrize("op", OPS)
def test_outputs_can_be_viewed(op: str, make: Callable[..., Inputs]) -> None:
    """The model views the first output as [batch, seq, channels]; targets read all of them as plain memory."""

    @settings(deadline=None, max_examples=60, derandomize=True)
    @example(sizes=ONES[op])
    @given(sizes=SIZES[op])
    def check(sizes: dict[str, Any]) -> None:
        assert all(tensor.is_contiguous() for tensor in call(op, make(op, **sizes)))

    check()


class Call(torch.nn.Module):
    """A module that calls an op, with its tensors as inputs and its numbers fixed."""

    def __init__(self, op: str, fixed: Inputs) -> None:
        super().__init__()
        self.op = op
        self.fixed = fixed

    def forward(self, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return call(self.op, self.fixed | tensors)


BATCH = Dim("batch")
SEQ = Dim("sequence")
PAST = Dim("past")
TOKENS = {0: BATCH, 1: SEQ}
STATE = {0: BATCH}
CACHE = {0: BATCH, 2: PAST}
FIXED = None
DYNAMIC: dict[str, dict[str, Any]] = {
    "ssm_scan": dict.fromkeys(("x", "dt", "B", "C", "mask"), TOKENS)
    | {"state": STATE}
    | dict.fromkeys(("A", "D", "dt_bias"), FIXED),
    "causal_conv": {"x": TOKENS, "state": STATE, "weight": FIXED, "bias": FIXED},
    "attention": dict.fromkeys(("q", "k", "v", "positions"), TOKENS)
    | dict.fromkeys(("past_k", "past_v"), CACHE)
    | {"mask": {0: BATCH, 1: Dim.DYNAMIC}},
}
# s: a size that stayed symbolic; s+s: the sum of two
OUTPUTS = {
    "ssm_scan": [("s", "s", 6, 3), ("s", 6, 3, 5)],
    "causal_conv": [("s", "s", 6), ("s", 6, 3)],
    "attention": [("s", "s", 4, 8), ("s", 2, "s+s", 8), ("s", 2, "s+s", 8)],
}


def size_kind(size: int | torch.SymInt) -> int | str:
    return size if isinstance(size, int) else "s+s" if size.node.expr.is_Add else "s"


@pytest.mark.parametrize("op", OPS)
def test_sizes_stay_dynamic_in_a_trace(op: str, make: Callable[..., Inputs]) -> None:
    inputs = make(op)
    tensors = {name: inputs[name] for name in inputs if isinstance(inputs[name], torch.Tensor)}
    fixed = {name: value for name, value in inputs.items() if name not in tensors}
    shapes = ({name: DYNAMIC[op][name] for name in tensors},)
    program = torch.export.export(Call(op, fixed), (tensors,), dynamic_shapes=shapes)
    outputs = [node.meta["val"] for node in program.graph.output_node().args[0]]
    assert [tuple(map(size_kind, output.shape)) for output in outputs] == OUTPUTS[op]
    assert [output.dtype for output in outputs] == [torch.float32] * len(outputs)
