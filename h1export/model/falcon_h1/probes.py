"""Probes: the tensors inside a model at which an export and its reference can be compared.

The name of a probe is "layer.point". Its value is float32 [batch, seq, width], heads side by side. The residual after
the last layer has the number of layers as its layer. Which op is suspect at a point is a view of the projections:
projections.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum

from h1export.model.falcon_h1.states import Array


class ProbePoint(StrEnum):
    """A place in a layer. Points are in the order of the computation: the first wrong one is next to the error."""

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


def probe_name(layer: int, point: ProbePoint) -> str:
    """Returns the name of a probe, such as "0.gate"."""
    return f"{layer}.{point}"


def probe_names(layers: int) -> list[str]:
    """Returns the names of all probes of a model of ``layers`` layers, in the order of the computation."""
    return [
        *(probe_name(layer, point) for layer in range(layers) for point in ProbePoint),
        probe_name(layers, ProbePoint.RESIDUAL),
    ]


PREFIX = "probe."  # begins the names that a target gives to a graph's values, so that a Runner finds its probes
Columns = tuple[int, int]  # [start, stop)
PART = re.compile(r"([^\[]+)(?:\[(\d+):(\d+)\])?")


def label(parts: Mapping[str, Columns | None]) -> str:
    """Returns the name of a graph's value that is one probe (None) or holds several side by side.

    Two probes in one value are named "probe.0.query[0:128]+0.key[128:192]".
    """
    return PREFIX + "+".join(name + ("[{}:{}]".format(*columns) if columns else "") for name, columns in parts.items())


def probes_in(name: str, value: Array) -> dict[str, Array]:
    """Returns probe -> its columns of ``value`` [..., width], whose ``name`` was made by ``label``."""
    found = {}
    for part in name.removeprefix(PREFIX).split("+"):
        match = PART.fullmatch(part)
        assert match is not None, name
        found[match[1]] = value if match[2] is None else value[..., int(match[2]) : int(match[3])]
    return found
