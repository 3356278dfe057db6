"""What precisions cost: the bits of every layer beside the divergence that they leave, of each artifact of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from h1export.artifact.artifact import Artifact
from h1export.model.falcon_h1.tensors import projection_of, split_layer, tensor_shapes
from h1export.quantize.precision import Precision

FLOATS = "floats"


def plan_words(artifact: Artifact) -> str:
    """Return the precisions of an artifact's matrices, by kind of matrix, such as "int4; int8: embed_tokens"."""
    kinds: dict[str, dict[str, None]] = {}
    for tensor, precision in _precisions(artifact).items():
        projection = projection_of(tensor)
        assert projection is not None, tensor
        name = FLOATS if precision is None else f"int{precision.bits}"
        kinds.setdefault(name, {})[projection.op] = None
    most = max(kinds, key=lambda name: len(kinds[name]))
    others = sorted(name for name in kinds if name != most)
    return "; ".join([most, *(f"{name}: {', '.join(kinds[name])}" for name in others)])


def bits_by_layer(artifact: Artifact) -> Mapping[int, float]:
    """Return layer -> bits of a weight in its matrices that are in integers, scales included."""
    found: dict[int, list[tuple[int, int]]] = {}
    for tensor, size in _sizes(artifact).items():
        layer, _ = split_layer(tensor)
        if layer is not None:
            found.setdefault(layer, []).append(size)
    return {layer: _mean(sizes) for layer, sizes in found.items()}


def bits(artifact: Artifact) -> float | None:
    """Return the bits of a weight in all matrices that are in integers, scales included; None where none is."""
    sizes = list(_sizes(artifact).values())
    return _mean(sizes) if sizes else None


def _precisions(artifact: Artifact) -> dict[str, Precision | None]:
    stored = {
        part.tensor: Precision(weight.bits, weight.group_size)
        for weight in artifact.manifest.weights
        for part in weight.parts
    }
    return {name: stored.get(name) for name in tensor_shapes(artifact.config) if projection_of(name) is not None}


def _sizes(artifact: Artifact) -> dict[str, tuple[int, int]]:
    """Return the weights and the bits of every matrix that is in integers."""
    shapes = tensor_shapes(artifact.config)
    found = {}
    for tensor, precision in _precisions(artifact).items():
        if precision is not None:
            rows, columns = shapes[tensor]
            found[tensor] = (rows * columns, precision.stored_bits((rows, columns)))
    return found


def _mean(sizes: Sequence[tuple[int, int]]) -> float:
    return sum(bits for _, bits in sizes) / sum(weights for weights, _ in sizes)
