"""Probes: the tensors inside a model at which an export and its reference can be compared, and what a difference there accuses.

A probe is called "layer.point". Its value is float32 [batch, seq, width], heads side by side; the last residual bears the number
of layers as its layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Point(StrEnum):
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


ACCUSED: Mapping[Point, str] = {
    Point.RESIDUAL: "down_proj",  # of the layer before; of layer 0: the embedding
    Point.GATE: "in_proj",
    Point.CONV_INPUT: "in_proj",
    Point.DT: "in_proj",
    Point.QUERY: "q_proj",
    Point.KEY: "k_proj",
    Point.VALUE: "v_proj",
    Point.CONV: "convolution",
    Point.GATED: "scan or its gate",
    Point.ATTENDED: "attention",
    Point.MIXED: "out_proj or o_proj",
    Point.PRODUCT: "gate_proj or up_proj",
}


def probe_name(layer: int, point: Point) -> str:
    return f"{layer}.{point}"


def probe_names(layers: int) -> list[str]:
    """Every probe of a model, in the order of the computation."""
    return [*(probe_name(layer, point) for layer in range(layers) for point in Point), probe_name(layers, Point.RESIDUAL)]


PREFIX = "probe."  # of the names that a target gives to a graph's values, so that a Runner finds its probes
