"""The section plugin_launches: its dry run passes, and each of its judgements fails on what is wrong."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu_host import plugin_bundle
from gpu_host.plugin_driver import CONV, SCAN
from gpu_host.section import Host
from gpu_host.sections import plugin_launches as section
from gpu_host.sections.plugin_launches import Call, Fault, compared, recorded, refused

from h1export.plugins import h1

pytestmark = pytest.mark.trt
SHAPE = plugin_bundle.shapes()["embedded"]
GOOD = ["built -1 0 7 0", "enqueued 0"]


@pytest.mark.slow
def test_the_dry_run_passes(tmp_path: Path) -> None:
    rows = list(section.run(Host(tmp_path / "bundle", tmp_path, "cpu")))
    assert [row for row in rows if not row.passed] == []
    assert len({row.name for row in rows}) == len(rows)
    assert sum(row.name.startswith("bad argument") for row in rows) > 30
    for op in ("SSMScan", "CausalConv"):
        for tokens in section.TOKENS:
            assert any(row.name.startswith(op) and f"tokens {tokens} " in row.name for row in rows)


@pytest.mark.parametrize("op", [SCAN, CONV], ids=["scan", "convolution"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_outputs_are_judged_by_float64(op: object, tokens: int, tmp_path: Path) -> None:
    """The eager ops' outputs pass for both dtypes, and a poisoned or slightly wrong one does not."""
    for dtype in section.DTYPES:
        call = Call(SCAN if op is SCAN else CONV, SHAPE, dtype, tokens, False)
        inputs = call.inputs()
        limits = (128, section.DT_MIN, float("inf")) if op is SCAN else ()
        wide = {name: value.float() for name, value in inputs.items()}
        y, state = (h1.ssm_scan if op is SCAN else h1.causal_conv)(*wide.values(), *limits)
        good = (y.to(inputs["x"].dtype), state.to(inputs["state"].dtype))
        poison = torch.full_like(good[0], torch.nan)
        wrong = good[1] * 1.001 if op is SCAN else good[1].roll(1, 0)
        for outputs, passed in ((good, True), ((poison, good[1]), False), ((good[0], wrong), False)):
            for index, value in enumerate(outputs):
                (tmp_path / f"out{index}.bin").write_bytes(section._bytes(value))
            assert compared(call, GOOD, tmp_path).passed is passed
        assert compared(call, [*GOOD[:1], "overrun output 0", *GOOD[1:]], tmp_path).passed is False
        assert compared(call, ["cuda cuCtxSynchronize 700"], tmp_path).passed is False


@pytest.mark.parametrize("tokens", [1, 2, 70])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_reference_is_the_recurrence_token_by_token(tokens: int, groups: int) -> None:
    shape = SHAPE._replace(heads=6, groups=groups)
    inputs = Call(SCAN, shape, "fp16", tokens, False).inputs()
    state = inputs["state"].double()
    rows = []
    for t in range(tokens):
        dt = torch.nn.functional.softplus(inputs["dt"][:, t].double() + inputs["dt_bias"]).clamp(min=section.DT_MIN)
        dt = dt * inputs["mask"][:, t, None]
        b, c = (inputs[name][:, t].double().repeat_interleave(6 // groups, 1) for name in ("B", "C"))
        x = inputs["x"][:, t].double()
        state = state * torch.exp(dt * inputs["A"])[..., None, None] + torch.einsum("bh,bhp,bhn->bhpn", dt, x, b)
        rows.append(torch.einsum("bhpn,bhn->bhp", state, c) + inputs["D"][:, None] * x)
    for found, expected in zip(section.scan_in_float64(inputs, False), (torch.stack(rows, 1), state), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_references_of_both_models_take_seconds() -> None:
    """They took the section's time on the first GPU host, token by token."""
    begun = time.process_time()
    for shape in plugin_bundle.shapes().values():
        for op in (SCAN, CONV):
            section.references(op.name, shape, "fp16", tokens=max(section.TOKENS))
    assert time.process_time() - begun < 5


def test_a_launch_with_another_argument_fails() -> None:
    call = Call(SCAN, SHAPE, "fp16", 300, False)
    launched, size = call.launches()
    lines = [f"built -1 0 7 {size}", *launched, "enqueued 0"]
    assert recorded(call, lines).passed
    assert not recorded(replace(call, tokens=2), lines).passed
    assert not recorded(call, lines[:-1]).passed


@pytest.mark.parametrize("line", ["enqueued 0", "cuda cuCtxSynchronize 700", "died -11", "launch code"])
def test_a_fault_must_be_named_and_leave_no_error(line: str) -> None:
    fault = Fault("a fault", "", "input x")
    named = "log 1 h1export::SSMScan: input x has no memory"
    assert refused(fault, [named, "enqueued -1"])
    assert not refused(fault, ["enqueued -1"])
    assert not refused(fault, [named, line])
