"""Planted faults: what an exporter of Falcon-H1 can get wrong exceeds the tolerance of test_model a hundredfold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h1export.graphs.passes.drop_metadata_asserts import DropMetadataAsserts
from h1export.graphs.program import Program
from h1export.graphs.trace import trace
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.plugins import h1

Edit = Callable[[Program], None]
Spoil = Callable[[FalconH1Config], FalconH1Config]

FAULT = 1e-3  # a hundred times the tolerance of test_model
CHUNKS = [13, 1, 8]
NAMES = ("z", "x", "B", "C", "dt")


def set_to_one(values: tuple[float, ...], index: int) -> tuple[Any, ...]:
    return (*values[:index], 1.0, *values[index + 1 :])


def without(name: str) -> Spoil:
    return lambda config: replace(config, **{name: 1.0})


def without_item(name: str, index: int) -> Spoil:
    return lambda config: replace(config, **{name: set_to_one(getattr(config, name), index)})


SCALARS = ("embedding", "lm_head", "attention_in", "attention_out", "key", "ssm_in", "ssm_out")
DROPPED: dict[str, Spoil] = {
    **{name: without(f"{name}_multiplier") for name in SCALARS},
    **{f"ssm {name}": without_item("ssm_multipliers", index) for index, name in enumerate(NAMES)},
    **{f"mlp {name}": without_item("mlp_multipliers", index) for index, name in enumerate(("gate", "down"))},
}
MISREAD: dict[str, Spoil] = {
    "rope_theta": lambda config: replace(config, rope_theta=1e4),
    "groups": lambda config: replace(config, mamba_n_groups=1, mamba_d_state=2 * config.mamba_d_state),
    "norm order": lambda config: replace(config, mamba_norm_before_gate=not config.mamba_norm_before_gate),
    "time step limits": lambda config: replace(config, time_step_limit=(0.0, float("inf"))),
    "upper time step limit": lambda config: replace(config, time_step_limit=(config.time_step_limit[0], float("inf"))),
    "lower time step limit": lambda config: replace(config, time_step_limit=(0.0, config.time_step_limit[1])),
    "epsilon of the norms": lambda config: replace(config, rms_norm_eps=1e-2),
}


@pytest.fixture(scope="session")
def limited_lab(make_checkpoint: Callable[..., Path], lab_of: Callable[[Path], Any]) -> Any:
    """As full_lab, with time step limits that bite."""
    extra = {"num_hidden_layers": 1, "mamba_rms_norm": True, "mamba_n_groups": 2, "time_step_limit": (0.02, 0.3)}
    return lab_of(make_checkpoint("all_biases", **extra))


def logits_error(actual: Any, expected: Any) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.ptp(expected))


@pytest.fixture(scope="session")
def fault_of() -> Callable[..., float]:
    """fault_of(lab, program) -> how far its logits are from transformers', over their range."""

    def measure(lab: Any, program: Program) -> float:
        logits, _ = lab.run(program, CHUNKS)
        expected, _ = lab.reference(lab.tokens[: sum(CHUNKS)])
        return logits_error(logits, expected)

    return measure


@pytest.fixture(scope="session")
def traced_as(apply_pass: Callable[..., Program]) -> Callable[[FalconH1Config], Program]:
    """traced_as(config) -> the model of ``config``, ready to run on any weights that fit."""
    return lambda config: apply_pass(DropMetadataAsserts(), trace(config))


@pytest.mark.parametrize("multiplier", DROPPED)
def test_a_dropped_multiplier_is_seen(
    multiplier: str, full_lab: Any, traced_as: Callable[[FalconH1Config], Program], fault_of: Callable[..., float]
) -> None:
    spoiled = DROPPED[multiplier](full_lab.config)
    assert spoiled != full_lab.config
    assert fault_of(full_lab, traced_as(spoiled)) > FAULT


@pytest.mark.parametrize("key", MISREAD)
def test_a_misread_key_is_seen(
    key: str, limited_lab: Any, traced_as: Callable[[FalconH1Config], Program], fault_of: Callable[..., float]
) -> None:
    spoiled = MISREAD[key](limited_lab.config)
    assert spoiled != limited_lab.config
    assert fault_of(limited_lab, traced_as(spoiled)) > FAULT


def test_without_a_fault_there_is_none(full_lab: Any, limited_lab: Any, fault_of: Callable[..., float]) -> None:
    """The same measure on the right program, so that a fault above is due to what was planted."""
    for lab in (full_lab, limited_lab):
        assert fault_of(lab, lab.unfolded) < FAULT / 100
        assert fault_of(lab, lab.passed) < FAULT / 100


def scan_args(program: Program, order: Callable[[list[Any]], list[Any]]) -> None:
    for scan in program.calls(h1.ssm_scan.default):
        scan.args = tuple(order(list(scan.args)))


def swap(args: list[Any], first: int, second: int) -> list[Any]:
    args[first], args[second] = args[second], args[first]
    return args


def swap_attention(program: Program, first: int, second: int) -> None:
    for node in program.calls(h1.attention.default):
        node.args = tuple(swap(list(node.args), first, second))


def drop_conv_bias(program: Program) -> None:
    for node in program.calls(h1.causal_conv.default):
        node.update_arg(3, None)


EDITS: dict[str, Edit] = {
    "B and C swapped": lambda program: scan_args(program, lambda args: swap(args, 3, 4)),
    "D and dt_bias swapped": lambda program: scan_args(program, lambda args: swap(args, 5, 6)),
    "k and v swapped": lambda program: swap_attention(program, 1, 2),
    "past keys and values swapped": lambda program: swap_attention(program, 3, 4),
    "no convolution bias": drop_conv_bias,
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_wrong_wire_is_seen(edit: str, full_lab: Any, fault_of: Callable[..., float]) -> None:
    program = full_lab.passed.editable()
    EDITS[edit](program)
    assert fault_of(full_lab, program) > FAULT


@pytest.mark.parametrize("kind", ["recurrent_state", "conv_state", "key", "value"])
def test_a_stale_state_is_seen(kind: str, full_lab: Any) -> None:
    """Decode with one kind of state as it was a call ago (keys and values: the newest column lost to zeros)."""
    runner = full_lab.runner(full_lab.passed)
    tokens = full_lab.tokens[:15]
    name = f"past_key_values.0.{kind}"
    _, before = runner.step(tokens[None, :13], np.ones((1, 13), np.int64), runner.initial(1))
    _, states = runner.step(tokens[None, 13:14], np.ones((1, 14), np.int64), before)
    stale = states[name].clone()
    if kind in ("key", "value"):
        stale[:, :, -1] = 0
    else:
        stale = before[name]
    logits, _ = runner.step(tokens[None, 14:], np.ones((1, 15), np.int64), states | {name: stale})
    expected, _ = full_lab.reference(tokens)
    right, _ = runner.step(tokens[None, 14:], np.ones((1, 15), np.int64), states)
    assert logits_error(logits[0], expected[-1:]) > FAULT
    assert logits_error(right[0], expected[-1:]) < FAULT / 100


def test_an_ignored_mask_is_seen(full_lab: Any) -> None:
    """A left-padded row run as if its pads were tokens."""
    runner = full_lab.runner(full_lab.passed)
    tokens = full_lab.tokens[:9]
    ids = np.concatenate([np.full(3, 7), tokens])[None]
    expected, _ = full_lab.reference(tokens)
    blind, _ = runner.step(ids, np.ones((1, 12), np.int64), runner.initial(1))
    right, _ = runner.step(ids, (np.arange(12) >= 3).astype(np.int64)[None], runner.initial(1))
    assert logits_error(blind[0, 3:], expected) > FAULT
    assert logits_error(right[0, 3:], expected) < FAULT / 100
