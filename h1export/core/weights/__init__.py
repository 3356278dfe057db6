"""Weights: which tensors a checkpoint must have (layout), where their bytes are (header, store), how initializers are made (expr)."""

from h1export.core.weights.expr import Multiplier, WeightExpr, WeightPart
from h1export.core.weights.layout import TensorLayout, tensor_layout
from h1export.core.weights.store import WeightStore

__all__ = ["Multiplier", "TensorLayout", "WeightExpr", "WeightPart", "WeightStore", "tensor_layout"]
