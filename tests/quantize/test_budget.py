"""Budgets: what is raised fits, and is worth more than what is not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.errors import H1ExportError
from h1export.quantize.budget import Budget, Sensitivity, bits_per_weight, within_bits, within_kl
from h1export.quantize.precision import INT8, Precision

LOW = Precision(4, 32)
MODELS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 8), st.floats(0, 0.1)), min_size=1, max_size=12).map(
    lambda rows: {f"t{i}": Sensitivity((count, 32 * groups), LOW, kl) for i, (count, groups, kl) in enumerate(rows)}
)


def test_bits_count_codes_and_scales() -> None:
    found = {"a": Sensitivity((10, 64), LOW, 0.1), "b": Sensitivity((30, 64), LOW, 0.1)}
    assert bits_per_weight(found, {}) == 4.5
    assert bits_per_weight(found, {"a": INT8}) == pytest.approx((10 * (8 + 16 / 64) + 30 * 4.5) / 40)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(found=MODELS, budget=st.floats(4.5, 9))
def test_a_budget_of_bits_is_kept_and_used(found: dict[str, Sensitivity], budget: float) -> None:
    raised = within_bits(found, INT8, budget)
    assert bits_per_weight(found, raised) <= budget
    for name in found.keys() - raised.keys():
        assert bits_per_weight(found, {**raised, name: INT8}) > budget, "there was room for one more"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(found=MODELS, budget=st.floats(0, 0.2))
def test_a_budget_of_divergence_is_kept_by_the_fewest_gains(found: dict[str, Sensitivity], budget: float) -> None:
    raised = within_kl(found, INT8, budget)
    assert sum(tensor.kl for name, tensor in found.items() if name not in raised) <= budget + 1e-12
    if raised:
        last = list(raised)[-1]
        assert sum(tensor.kl for name, tensor in found.items() if name not in raised or name == last) > budget - 1e-12


def test_the_most_sensitive_for_its_size_comes_first() -> None:
    found = {
        "large": Sensitivity((400, 64), LOW, 0.02),
        "small": Sensitivity((10, 64), LOW, 0.01),
        "deaf": Sensitivity((10, 64), LOW, 0.0),
    }
    assert list(within_bits(found, INT8, 4.6)) == ["small"]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_budget(value: float) -> None:
    with pytest.raises(H1ExportError, match="is not a budget"):
        Budget(bits=value)


def test_less_than_int4_needs_is_refused() -> None:
    with pytest.raises(H1ExportError, match=r"--budget-bits: 4\.2 is less than the 4\.500 of int4 alone"):
        Budget(bits=4.2).raised({"a": Sensitivity((10, 64), LOW, 0.1)})
