"""A layer that runs in stages, so that the weights of one stage can be replaced before the next one runs.

A layer multiplies by weights at five places, whose inputs INPUT_GROUPS names. Each depends on the weights before it.
GPTQ needs the input of a weight as the quantised model has it, with the integers of the weights before it in the same
layer. So it runs the layer up to the next weights, solves them, puts their values in, and goes on: a layer runs once in
all. Products are computed in bf16 where the device says so, and inputs and residuals stay in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from h1export.graphs.model import Layer, layer_states, mup_vector, scaled
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.projections import (
    DOWN_PROJ,
    GATE_PROJ,
    IN_PROJ,
    INPUT_GROUPS,
    LAYER_PROJECTIONS,
    O_PROJ,
    OUT_PROJ,
)
from h1export.model.falcon_h1.states import StateSpec
from h1export.model.falcon_h1.tensors import layer_prefix
from h1export.quantize.device import CPU_DEVICE, ComputeDevice
from h1export.quantize.layers import ReadWeight


@dataclass(frozen=True)
class Stopped:
    """A layer that has stopped before the weights of some groups.

    Attributes:
        residual: the residual stream there, float32 [n, seq, hidden].
        inputs: group -> the input of its weights, float32 [n, seq, columns].
    """

    residual: Tensor
    inputs: Mapping[str, Tensor]

    def flat(self, group: str) -> Tensor:
        """Returns the input of a group, [n * seq, columns]."""
        return self.inputs[group].flatten(0, 1)


# Groups of weights before which a layer stops, in order; all others are those of a group of INPUT_GROUPS each.
STOPS: Sequence[tuple[str, ...]] = (
    (IN_PROJ.name,),
    (OUT_PROJ.name, O_PROJ.name),
    (GATE_PROJ.name,),
    (DOWN_PROJ.name,),
)


class StagedLayer:
    """One layer, which runs from one stop to the next on whole sequences from empty states."""

    def __init__(
        self,
        config: FalconH1Config,
        layer: int,
        *,
        read: ReadWeight,
        device: ComputeDevice = CPU_DEVICE,
    ) -> None:
        """``read`` gives a tensor by its checkpoint name, now where it is no weight of STOPS, and in ``put``."""
        self._config = config
        self._prefix = layer_prefix(layer)
        self._read = read
        self._device = device
        with torch.device("meta"):
            self._layer = Layer(config)
        later = {projection.weight for projection in LAYER_PROJECTIONS}
        self._layer.load_state_dict(
            {name: self._tensor(name) for name, _ in self._layer.named_parameters() if name not in later},
            assign=True,
            strict=False,
        )
        self._layer.mamba.mup = mup_vector(config).to(device.place)
        self._empty = StateSpec.of(config).of_layer(0)

    def put(self, stop: int) -> None:
        """Read the weights before which the layer stops at STOPS[stop]."""
        weights = [projection.weight for group in STOPS[stop] for projection in INPUT_GROUPS[group]]
        tensors = {name: self._tensor(name) for name in weights}
        if self._device.halves:  # now rather than in every run
            tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        self._layer.load_state_dict(tensors, assign=True, strict=False)

    def start(self, hidden: Tensor) -> Stopped:
        """Returns the first stop for the layer's input [seq, hidden] or [n, seq, hidden]."""
        residual = hidden.reshape(-1, *hidden.shape[-2:]).to(self._device.place)
        with torch.no_grad():
            normed = self._layer.input_layernorm(residual)
        return Stopped(residual, {IN_PROJ.name: scaled(normed, self._config.ssm_in_multiplier)})

    def run(self, stop: int, at: Stopped) -> Stopped:
        """Returns the stop after ``at``, which is STOPS[stop]; after the last, the residual is the layer's output.

        The weights of ``stop`` were put. Called on any thread.
        """
        # not an attribute: a layer that refers to itself is kept, with its weights, until Python looks for cycles
        steps = (self._mix, self._add, self._multiply, self._end)
        with torch.no_grad(), self._products():
            found = steps[stop](at)
        return Stopped(found.residual.float(), {name: value.float() for name, value in found.inputs.items()})

    def _products(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16) if self._device.halves else nullcontext()

    def _tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self._read(self._prefix + name)).to(self._device.place)

    def _mix(self, at: Stopped) -> Stopped:
        count, seq = at.residual.shape[:2]
        place = self._device.place
        ones = torch.ones(count, seq, device=place)
        positions = torch.arange(seq, device=place).expand(count, seq)
        states = layer_states([torch.zeros(state.sized(count, 0), device=place) for state in self._empty])
        ((keys, values, conv, recurrent),) = states
        x = self._layer.input_layernorm(at.residual)
        gated, _, _ = self._layer.mamba.gated(x, ones, conv, recurrent)
        x = scaled(x, self._config.attention_in_multiplier)
        attended, _, _ = self._layer.self_attn.attended(x, positions, ones.long(), keys, values)
        return Stopped(at.residual, {OUT_PROJ.name: gated, O_PROJ.name: attended})

    def _add(self, at: Stopped) -> Stopped:
        config = self._config
        mixed = self._layer.mamba.out_proj(at.inputs[OUT_PROJ.name])
        attended = self._layer.self_attn.o_proj(at.inputs[O_PROJ.name])
        residual = at.residual + scaled(mixed, config.ssm_out_multiplier)
        residual = residual + scaled(attended, config.attention_out_multiplier)
        return Stopped(residual, {GATE_PROJ.name: self._layer.pre_ff_layernorm(residual)})

    def _multiply(self, at: Stopped) -> Stopped:
        return Stopped(at.residual, {DOWN_PROJ.name: self._layer.feed_forward.product(at.inputs[GATE_PROJ.name])})

    def _end(self, at: Stopped) -> Stopped:
        product = self._layer.feed_forward.down_proj(at.inputs[DOWN_PROJ.name])
        return Stopped(at.residual + scaled(product, self._config.mlp_multipliers[1]), {})
