"""Presets are rules: which tensors they raise, what plans say of them, and the table of the documentation."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import EMBEDDING, projection_of, tensor_shapes
from h1export.quantize.choices import Preset
from h1export.quantize.presets import DEFAULT, MEASURED, RULES, chosen_by, preset_plans
from h1export.quantize.scheme import QuantScheme

DOC = Path(__file__).parents[2] / "docs" / "measurements.md"
NAMES = {
    "small": {"out_proj", "down_proj", "embed_tokens"},
    "balanced": {"k_proj", "v_proj", "embed_tokens", "lm_head"},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("preset", get_args(Preset))
def test_a_preset_raises_what_its_rules_name(
    preset: Preset, tied: bool, config_of: Callable[..., FalconH1Config]
) -> None:
    config = config_of(tie_word_embeddings=tied, num_hidden_layers=3)
    chosen = chosen_by(preset, config)
    QuantScheme("int4", chosen=chosen).check(config)
    assert set(chosen.values()) == {"int8"}
    found = {projection.op for name in chosen if (projection := projection_of(name)) is not None}
    assert found == NAMES[preset] - ({"lm_head"} if tied else set())
    assert len(chosen) == sum(1 if op in ("embed_tokens", "lm_head") else 3 for op in found)
    assert len(RULES[preset]) == len(NAMES[preset])


def test_plans_expect_the_sum_of_what_stays_in_few_bits(config_of: Callable[..., FalconH1Config]) -> None:
    config = config_of(num_hidden_layers=2)
    names = [name for name, found in QuantScheme("int4").precisions(config).items() if found.bits == 4]
    measured = {name: 2.0**-place for place, name in enumerate(names)}
    plans = {plan.name: plan for plan in preset_plans(config, 32, measured)}
    assert plans[DEFAULT].expected == pytest.approx(sum(measured.values()))
    for preset in get_args(Preset):
        raised = chosen_by(preset, config)
        left = sum(kl for name, kl in measured.items() if name not in raised)
        assert plans[preset].expected == pytest.approx(left)
        assert plans[preset].bits > plans[DEFAULT].bits
        assert plans[preset].nbytes > plans[DEFAULT].nbytes
    assert all(plan.expected is None for plan in preset_plans(config, 32, None))
    del measured[names[3]]
    with pytest.raises(H1ExportError, match=f'--sensitivity: the file has no sensitivity of "{re.escape(names[3])}"'):
        preset_plans(config, 32, measured)


def test_bits_are_those_of_the_rule(config_of: Callable[..., FalconH1Config]) -> None:
    config = config_of(tie_word_embeddings=True)
    (default, *_) = preset_plans(config, 64, None)
    assert default.bits == 4 + 16 / 64
    shapes = tensor_shapes(config)
    assert default.nbytes * 8 == sum(
        default.bits * shapes[name][0] * shapes[name][1] for name in QuantScheme("int4", 64).precisions(config)
    )
    assert EMBEDDING in QuantScheme("int4", 64).precisions(config)


def test_measured_figures_are_those_of_the_documentation() -> None:
    """Rows such as `| `--preset small` | 1.047 MB | 5.79 | 0.0229 ± 0.0007 | +0.84 % | ... |`, proxy behind."""
    text = DOC.read_text(encoding="utf-8")
    assert set(MEASURED) == {DEFAULT, *get_args(Preset)}
    for name, models in MEASURED.items():
        label = "int4, the default" if name == DEFAULT else f"`--preset {name}`"
        (line,) = re.findall(rf"^\| {re.escape(label)} \|(.*)\|$", text, re.MULTILINE)
        cells = [cell.strip() for cell in line.split("|")]
        rows = [cells[place : place + 4] for place in (0, 4)]
        for figures, (_, bits, kl, loss) in zip(models.values(), rows, strict=True):
            assert f"{figures.bits:.2f}" == bits
            assert f"{figures.kl:.4f}" == kl.split(" ")[0]
            assert f"{100 * figures.loss:+.2f} %" == loss.split(" ±")[0]
