"""What the ops run on a CUDA device: the same functions over Triton's interpreter on a CPU, and the ops on a GPU.

Expected values are those of the eager references in float32 on a CPU, for whatever layouts and dtypes the references
take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_dispatch import MODULES, ROUNDING, Edit, Inputs, exact, moved, op_on, permuted, within
from torch import Tensor

from h1export.plugins import h1
from h1export.plugins.gpu import device as gpu_device
from h1export.plugins.gpu import sdk

pytestmark = pytest.mark.trt

Make = Callable[..., Inputs]


def of_one_parent(inputs: Inputs) -> Inputs:
    """x, B and C as the model has them: views of one tensor's columns; and dt, of another's."""
    x, B, C = (inputs[name] for name in ("x", "B", "C"))
    parent = torch.cat([tensor.flatten(2) for tensor in (x, B, C)], dim=2)
    parts = parent.split([x[0, 0].numel(), B[0, 0].numel(), C[0, 0].numel()], dim=2)
    views = {name: part.view(tensor.shape) for name, part, tensor in zip("xBC", parts, (x, B, C), strict=True)}
    return views | {"dt": torch.cat([inputs["dt"], inputs["dt"]], dim=2)[:, :, x.shape[2] :]}


def cast(dtype: torch.dtype, *names: str) -> Edit:
    return lambda inputs: {name: inputs[name].to(dtype) for name in names}


def every_other(*names: str) -> Edit:
    """The tensors as every other element of the last axis of a tensor twice as long."""
    return lambda inputs: {name: inputs[name].repeat_interleave(2, dim=-1)[..., ::2] for name in names}


def shifted(*names: str) -> Edit:
    """The tensors one element after the start of their memory."""
    return lambda inputs: {
        name: torch.cat([inputs[name].flatten()[:1], inputs[name].flatten()])[1:].view(inputs[name].shape)
        for name in names
    }


KERNELS: dict[str, list[tuple[str, Edit]]] = {
    "ssm_scan": [
        ("as it is", lambda i: {}),
        ("views of one parent", of_one_parent),
        ("permuted", permuted("x", "dt", "B", "C", "state", "mask")),
        ("strided", every_other("x", "dt", "A", "B", "C", "D", "dt_bias", "state", "mask")),
        ("a batch that is one row", lambda i: {"B": i["B"][:1].expand_as(i["B"])}),
        ("float32 steps", cast(torch.float32, "dt", "mask")),
        ("16-bit parameters", cast(torch.bfloat16, "A", "D", "dt_bias")),
        ("float64 parameters", cast(torch.float64, "A", "D", "dt_bias", "state")),
        ("16-bit state", cast(torch.float16, "state")),
        ("bool mask", cast(torch.bool, "mask")),
        ("int64 mask", cast(torch.int64, "mask")),
        ("float32 B", cast(torch.float32, "B")),
        ("B and C of other dtypes", lambda i: {"B": i["B"].bfloat16(), "C": i["C"].half()}),
        ("pointers that 16 does not divide", shifted("x", "dt", "A", "B", "C", "D", "dt_bias", "state", "mask")),
        ("limits", lambda i: {"dt_min": 0.02, "dt_max": 0.3}),
        ("chunks of one token", lambda i: {"chunk_size": 1}),
    ],
    "causal_conv": [
        ("as it is", lambda i: {}),
        ("permuted", permuted("x", "state", "weight")),
        ("strided", every_other("x", "state", "weight", "bias")),
        ("a batch that is one row", lambda i: {"x": i["x"][:1].expand_as(i["x"])}),
        ("no bias", lambda i: {"bias": None}),
        (
            "channels that 16 does not divide",
            lambda i: (
                {"x": i["x"][..., :19], "state": i["state"][:, :19]}
                | {"weight": i["weight"][:19], "bias": i["bias"][:19]}
            ),
        ),
        ("pointers that 16 does not divide", shifted("x", "state", "weight", "bias")),
    ],
}


# 16-bit tensors make the edits differ from the case as it is; Triton compiles each mixture of dtypes once
TAKEN = [
    pytest.param(op, edit, dtype, id=f"{op}: {name}, {dtype}")
    for op in KERNELS
    for name, edit in KERNELS[op]
    for dtype in (ROUNDING if name == "as it is" else [torch.bfloat16])
]


@pytest.mark.parametrize("seq", [1, 9])
@pytest.mark.parametrize(("op", "edit", "dtype"), TAKEN)
def test_the_kernels_take_what_the_reference_takes(
    op: str, edit: Edit, seq: int, dtype: torch.dtype, device: torch.device, make: Make, ran: list[str]
) -> None:
    inputs = make(op, seq=seq, dtype=dtype)
    inputs |= edit(inputs)
    held = moved(inputs, device)
    before = {name: value.clone() for name, value in held.items() if isinstance(value, Tensor)}
    actual = op_on(op, device)(**held)
    assert ran == ["kernels"]
    within(actual, exact(op, inputs), op, dtype=inputs["x"].dtype)
    second = torch.float32 if op == "ssm_scan" else dtype
    assert [tensor.dtype for tensor in actual] == [inputs["x"].dtype, second]
    assert all(torch.equal(held[name], value) for name, value in before.items())
    owned = {value.untyped_storage().data_ptr() for value in held.values() if isinstance(value, Tensor)}
    assert not owned & {tensor.untyped_storage().data_ptr() for tensor in actual}


def sizes(**changed: Any) -> Inputs:
    return changed


# (op, sizes of the inputs, edit, a word of the reason)
REFERENCE: list[tuple[str, Inputs, Edit, str]] = [
    ("ssm_scan", sizes(d_head=3, d_state=5), lambda i: {}, "no row for head dim 3"),
    ("ssm_scan", sizes(d_head=32, d_state=16), lambda i: {}, "no row for head dim 32"),
    ("ssm_scan", sizes(dtype=torch.float64), lambda i: {}, "torch.float64"),
    ("ssm_scan", sizes(), lambda i: {"mask": i["mask"][1:]}, "mask has the shape"),
    ("ssm_scan", sizes(), lambda i: {"A": i["A"][:1]}, "A has the shape"),
    ("ssm_scan", sizes(seq=0), lambda i: {}, "x has the shape"),
    ("ssm_scan", sizes(batch=0), lambda i: {}, "x has the shape"),
    ("causal_conv", sizes(dtype=torch.float64), lambda i: {}, "torch.float64"),
    ("causal_conv", sizes(taps=1), lambda i: {}, "1 taps"),
    ("causal_conv", sizes(seq=0), lambda i: {}, "x has the shape"),
    ("causal_conv", sizes(batch=0, pads=()), lambda i: {}, "x has the shape"),
]


@pytest.mark.parametrize(
    ("op", "changed", "edit", "reason"), REFERENCE, ids=lambda value: None if callable(value) else str(value)[:40]
)
def test_the_reference_runs_where_the_kernels_cannot(
    op: str, changed: Inputs, edit: Edit, reason: str, device: torch.device, make: Make, ran: list[str]
) -> None:
    inputs = make(op, **changed)
    inputs |= edit(inputs)
    held = moved(inputs, device)
    refusal = MODULES[op].refusal
    tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    assert reason in refusal(**tensors)
    actual = op_on(op, device)(**held)
    assert ran == ["reference"]
    for got, true in zip(actual, getattr(h1, op)(**inputs), strict=True):
        torch.testing.assert_close(got.cpu(), true, rtol=1e-5, atol=1e-5)
        assert got.is_contiguous()


def grown(name: str, axis: int) -> Edit:
    return lambda i: {name: torch.cat([i[name], i[name]], dim=axis)}


WRONG: list[tuple[str, str, Edit]] = [
    *[("ssm_scan", f"{name} axis {axis}", grown(name, axis)) for name, axes in
      {"dt": 3, "A": 1, "B": 4, "C": 4, "D": 1, "dt_bias": 1, "state": 4, "mask": 2}.items() for axis in range(axes)],
    ("ssm_scan", "three groups of four heads", lambda i: {n: i[n][:, :, :1].repeat(1, 1, 3, 1) for n in "BC"}),
    ("ssm_scan", "no groups", lambda i: {n: i[n][:, :, :0] for n in "BC"}),
    ("ssm_scan", "x of three axes", lambda i: {"x": i["x"].flatten(2)}),
    *[("causal_conv", f"{name} axis {axis}", grown(name, axis)) for name, axes in
      {"state": 2, "bias": 1}.items() for axis in range(axes)],
    ("causal_conv", "weight axis 0", grown("weight", 0)),
    ("causal_conv", "weight axis 1", grown("weight", 1)),
    ("causal_conv", "x of two axes", lambda i: {"x": i["x"].flatten(1)}),
    ("causal_conv", "another dtype of the weight", cast(torch.float16, "weight")),
]  # fmt: skip


@pytest.mark.parametrize(("op", "edit"), [pytest.param(op, edit, id=f"{op}: {name}") for op, name, edit in WRONG])
def test_wrong_arguments_launch_no_kernel(
    op: str, edit: Edit, device: torch.device, make: Make, ran: list[str]
) -> None:
    """A kernel would read beyond a tensor's memory; the reference raises PyTorch's error or broadcasts."""
    inputs = make(op)
    inputs |= edit(inputs)

    def outcome(call: Any, arguments: Inputs) -> Any:
        try:
            return [(tuple(tensor.shape), tensor.dtype) for tensor in call(**arguments)]
        except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
            return type(error)

    expected = outcome(getattr(h1, op), inputs)
    ran.clear()
    assert outcome(op_on(op, device), moved(inputs, device)) == expected
    assert ran == ["reference"]


@pytest.mark.parametrize("op", MODULES)
def test_a_launch_that_exceeds_a_grid_is_left_to_the_reference(op: str, make: Make) -> None:
    """On the meta device, where such tensors take no memory."""
    many = gpu_device.GRID_LIMIT + 1
    inputs = {name: value.to("meta") for name, value in make(op).items() if isinstance(value, Tensor)}
    fixed = ("A", "D", "dt_bias", "weight", "bias")
    for axis, size, kept in ((0, many, fixed), (1, many * 128, (*fixed, "state"))):
        grown = {
            name: value if name in kept else value.narrow(axis, 0, 1).repeat_interleave(size, dim=axis)
            for name, value in inputs.items()
        }
        assert "exceed a grid" in MODULES[op].refusal(**grown)


@pytest.mark.parametrize("op", MODULES)
def test_without_triton_the_reference_runs(
    op: str, make: Make, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdk, "installed", lambda: False)
    monkeypatch.setattr(gpu_device, "refusal", gpu_device.refusal.__wrapped__)
    inputs = make(op)
    actual = op_on(op, torch.device("cpu"))(**inputs)
    assert ran == ["reference"]
    assert all(map(torch.equal, actual, getattr(h1, op)(**inputs)))
