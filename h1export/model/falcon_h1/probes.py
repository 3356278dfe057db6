"""Probes: the tensors inside a model at which an export and its reference can be compared, and what a difference there accuses.

A probe is called "layer.point". Its value is float32 [batch, seq, width], heads side by side; the last residual bears the number
of layers as its layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum

from h1export.model.falcon_h1.states import Array


class ProbePoint(StrEnum):
    """Where in a layer, in the order of the computation: what is right before a point and wrong at it went wrong there."""

    RESIDUAL = "residual"  # what the layer's first norm reads
    GATE = "gate"  # z, before its SiLU
    CONV_INPUT = "conv_input"  # x, B and C
    DT = "dt"  # before bias and softplus
    QUERY = "query"  # before the rotary embedding, as keys
    KEY = "key"
    VALUE = "value"
    CONV = "conv"  # after its SiLU
    GATED = "gated"  # what out_proj reads
    ATTENDED = "attended"  # what o_proj reads
    MIXED = "mixed"  # what the layer's second norm reads
    PRODUCT = "product"  # what down_proj reads


SUSPECT_OPS: Mapping[ProbePoint, str] = {
    ProbePoint.RESIDUAL: "down_proj",  # of the layer before; of layer 0: the embedding
    ProbePoint.GATE: "in_proj",
    ProbePoint.CONV_INPUT: "in_proj",
    ProbePoint.DT: "in_proj",
    ProbePoint.QUERY: "q_proj",
    ProbePoint.KEY: "k_proj",
    ProbePoint.VALUE: "v_proj",
    ProbePoint.CONV: "convolution",
    ProbePoint.GATED: "scan or its gate",
    ProbePoint.ATTENDED: "attention",
    ProbePoint.MIXED: "out_proj or o_proj",
    ProbePoint.PRODUCT: "gate_proj or up_proj",
}
SUSPECT_MLP = "gate_proj, up_proj or down_proj"  # accused at the residual where one kernel computes what lies between


def probe_name(layer: int, point: ProbePoint) -> str:
    return f"{layer}.{point}"


def probe_names(layers: int) -> list[str]:
    """Every probe of a model, in the order of the computation."""
    return [
        *(probe_name(layer, point) for layer in range(layers) for point in ProbePoint),
        probe_name(layers, ProbePoint.RESIDUAL),
    ]


PREFIX = "probe."  # of the names that a target gives to a graph's values, so that a Runner finds its probes
Columns = tuple[int, int]  # the first, and the first after them
PART = re.compile(r"([^\[]+)(?:\[(\d+):(\d+)\])?")


def label(parts: Mapping[str, Columns | None]) -> str:
    """The name of a graph's value that is a probe (None), or holds several side by side: probe.0.query[0:128]+0.key[128:192]."""
    return PREFIX + "+".join(name + ("[{}:{}]".format(*columns) if columns else "") for name, columns in parts.items())


def probes_in(name: str, value: Array) -> dict[str, Array]:
    """Probe -> its columns of ``value`` [..., width], which ``label`` gave its ``name``."""
    found = {}
    for part in name.removeprefix(PREFIX).split("+"):
        match = PART.fullmatch(part)
        assert match is not None, name
        found[match[1]] = value if match[2] is None else value[..., int(match[2]) : int(match[3])]
    return found
