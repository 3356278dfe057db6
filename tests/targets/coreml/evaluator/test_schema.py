"""The names of every op's inputs, and whether they are optional, against the op definitions of coremltools."""

from __future__ import annotations

from types import SimpleNamespace

import coremltools as ct
import pytest
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

from h1export.targets.coreml.evaluator.ops import CONTROL, TABLE

STRICTER = {("conv", "pad_type"), ("scatter", "mode"), ("scatter_along_axis", "mode"), ("scatter_nd", "mode")}


def definition(op: str) -> dict[str, bool]:
    """Return whether each input is optional, in the newest definition up to iOS 18."""
    versions = SSAOpRegistry.core_ops[op]
    newest = max((target for target in versions if target <= ct.target.iOS18), key=lambda target: target.value)
    return {name: kind.optional for name, kind in versions[newest].input_spec.input_types.items()}


@pytest.mark.parametrize("op", sorted(TABLE))
def test_inputs_are_those_of_the_definition(op: str) -> None:
    own = {name: not parameter.required for name, parameter in TABLE[op].parameters.items()}
    defined = definition(op)
    assert own.keys() == defined.keys()
    assert {name for name in own if own[name] and not defined[name]} == set(), "optional here, required there"
    assert {name for name in own if not own[name] and defined[name]} <= {
        name for other, name in STRICTER if other == op
    }


def test_control_is_not_in_the_table() -> None:
    assert not {*CONTROL} & TABLE.keys()


# these default to something that depends on an input
DEPENDENT = {
    "rsqrt",
    "log",
    "inverse",
    "conv",
    "layer_norm",
    "max_pool",
    "avg_pool",
    "linear",
    "topk",
    "reduce_argmax",
    "reduce_argmin",
}


@pytest.mark.parametrize("op", sorted(TABLE.keys() - DEPENDENT - {op for op, _ in STRICTER}))
def test_defaults_are_those_of_the_definition(op: str) -> None:
    versions = SSAOpRegistry.core_ops[op]
    newest = max((target for target in versions if target <= ct.target.iOS18), key=lambda target: target.value)
    defined = dict(versions[newest].default_inputs(SimpleNamespace(x=SimpleNamespace(rank=3)))._default_inputs)
    for name, parameter in TABLE[op].parameters.items():
        if name in defined and parameter.default is not None:
            assert parameter.default == defined[name], name
