"""Presets: named rules for the precisions of tensors, and what they cost on the two models that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.projections import DOWN_PROJ, EMBED_TOKENS, HEAD, K_PROJ, OUT_PROJ, V_PROJ
from h1export.model.falcon_h1.tensors import split_layer, tensor_shapes
from h1export.quantize.choices import Preset, QuantName
from h1export.quantize.scheme import QuantScheme

# Preset -> the weights, by their names within a layer or the model, that have another precision than int4.
RULES: Mapping[Preset, Mapping[str, QuantName]] = {
    "small": dict.fromkeys((OUT_PROJ.weight, DOWN_PROJ.weight, EMBED_TOKENS.weight), "int8"),
    "balanced": dict.fromkeys((K_PROJ.weight, V_PROJ.weight, HEAD.weight, EMBED_TOKENS.weight), "int8"),
}


DEFAULT = "int4"  # no preset
EMBEDDED = "the embedded model"
PROXY = "benchmarks/proxy"


@dataclass(frozen=True)
class Measured:
    """The cost of a choice of precisions with GPTQ on a held-out text (docs/measurements.md).

    Attributes:
        bits: bits of a matrix's weight, scales included; the embedding is one of the matrices.
        kl: mean KL divergence from the full model's predictions, in nats per token.
        loss: growth of the bits per byte, as a share.
    """

    bits: float
    kl: float
    loss: float


# Preset -> model -> its figures in the table of docs/measurements.md.
MEASURED: Mapping[str, Mapping[str, Measured]] = {
    DEFAULT: {
        EMBEDDED: Measured(bits=5.18, kl=0.0080, loss=0.0021),
        PROXY: Measured(bits=4.50, kl=0.0406, loss=0.0148),
    },
    "small": {
        EMBEDDED: Measured(bits=5.68, kl=0.0067, loss=0.0019),
        PROXY: Measured(bits=5.79, kl=0.0163, loss=0.0076),
    },
    "balanced": {
        EMBEDDED: Measured(bits=6.03, kl=0.0033, loss=0.0003),
        PROXY: Measured(bits=5.31, kl=0.0212, loss=0.0077),
    },
}


def chosen_by(preset: Preset, config: FalconH1Config) -> dict[str, QuantName]:
    """Returns checkpoint tensor -> the precision that ``preset`` gives it, for the tensors that it names."""
    rules = RULES[preset]
    named = {tensor: rules.get(split_layer(tensor)[1]) for tensor in tensor_shapes(config)}
    return {tensor: quant for tensor, quant in named.items() if quant is not None}


@dataclass(frozen=True)
class PresetPlan:
    """A preset for one model.

    Attributes:
        name: the preset; DEFAULT: int4 without one.
        nbytes: bytes of the codes and scales of all matrices, the embedding included.
        bits: bits of a matrix's weight on average.
        expected: the sum of the divergences of the tensors that stay int4, from the model's own sensitivities, in nats
            per token; None where they are not at hand.
        measured: model that was measured -> its mean KL divergence under the preset, in nats per token.
    """

    name: str
    nbytes: int
    bits: float
    expected: float | None
    measured: Mapping[str, float]


def preset_plans(
    config: FalconH1Config, group_size: int, measured: Mapping[str, float] | None
) -> tuple[PresetPlan, ...]:
    """Returns int4 in groups of ``group_size`` without a preset, and with each.

    ``measured`` are sensitivities of the model's tensors in int4: name -> KL in nats.

    Raises:
        H1ExportError: a tensor of the model that is int4 has no sensitivity.
    """
    choices: dict[str, Mapping[str, QuantName]] = {DEFAULT: {}}
    choices |= {preset: chosen_by(preset, config) for preset in RULES}
    return tuple(
        _planned(name, QuantScheme("int4", group_size, chosen=chosen), config, measured=measured)
        for name, chosen in choices.items()
    )


def _planned(
    name: str, scheme: QuantScheme, config: FalconH1Config, *, measured: Mapping[str, float] | None
) -> PresetPlan:
    precisions = scheme.precisions(config)
    shapes = tensor_shapes(config)
    bits = sum(
        precision.stored_bits((shapes[tensor][0], shapes[tensor][1])) for tensor, precision in precisions.items()
    )
    expected = None
    if measured is not None:
        kept = [tensor for tensor, precision in precisions.items() if precision.bits == 4]
        if lacking := [tensor for tensor in kept if tensor not in measured]:
            what = f'the file has no sensitivity of "{lacking[0]}"'
            raise H1ExportError("--sensitivity", what, "give what h1export sensitivity --json printed for it")
        expected = sum(measured[tensor] for tensor in kept)
    values = sum(prod(shapes[tensor]) for tensor in precisions)
    found = {model: figures.kl for model, figures in MEASURED[name].items()}
    return PresetPlan(name, bits // 8, bits / values, expected=expected, measured=found)
