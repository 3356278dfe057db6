"""PackedSet: which weights of the folder are integers, and the ``quantization_config`` that tells engines so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from h1export.checkpoint.packed_format import WORD
from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.projections import ModelPart
from h1export.model.falcon_h1.tensors import LM_HEAD, projection_of, split_layer, tensor_shapes
from h1export.quantize.precision import Precision
from h1export.quantize.source import QuantizedWeights
from h1export.targets.gptq.options import GptqOptions

METHOD = "gptq"
FORMAT = "gptq"  # version 1, in which 1 is subtracted from every zero point


@dataclass(frozen=True)
class PackedSet:
    """The weights that are stored in integers, and what all of them share.

    Attributes:
        tensors: checkpoint names, in the architecture's order.
        precision: their precision; None where there are none.
        reasons: weight that the build has in integers and the folder in floats -> why.
        sorted_columns: whether groups are not the neighbouring columns, as after act-order.
    """

    tensors: tuple[str, ...]
    precision: Precision | None
    reasons: Mapping[str, str]
    sorted_columns: bool

    @classmethod
    def of(
        cls, store: WeightStore, integers: QuantizedWeights, config: FalconH1Config, *, options: GptqOptions
    ) -> PackedSet:
        """Choose the packed weights of a build.

        Raises:
            H1ExportError: the build has integers and none of them can be packed, or packed weights differ in their
                precision, which the layout has no place for.
        """
        reasons: dict[str, str] = {}
        packed: dict[str, Precision] = {}
        for name in tensor_shapes(config):
            precision = integers.precisions.get(name)
            if precision is None:
                continue
            reason = _reason(name, precision, store.shape(name), options=options)
            if reason:
                reasons[name] = reason
            else:
                packed[name] = precision
        if reasons and not packed:
            first, reason = next(reversed(reasons.items()))
            what = f"no weight can be packed; for example, {reason}"
            raise H1ExportError(f'tensor "{first}"', what, "leave out --unpacked, or use --quant none")
        _check_one_precision(packed)
        precision = next(iter(packed.values()), None)
        ordered = any(store.order_name(name) for name in packed)
        return cls(tuple(packed), precision, reasons, sorted_columns=ordered)

    def quantization_config(self, config: FalconH1Config) -> dict[str, Any]:
        """Return the value of config.json's key; empty where nothing is packed."""
        if self.precision is None:
            return {}
        found: dict[str, Any] = {
            "quant_method": METHOD,
            "bits": self.precision.bits,
            "group_size": self.precision.group_size or -1,
            "sym": not self.precision.zeros,
            "desc_act": self.sorted_columns,
            "checkpoint_format": FORMAT,
            "pack_dtype": "int32",
            "lm_head": LM_HEAD in self.tensors,
        }
        if rules := self._exclusions(config):
            found["dynamic"] = {rule: {} for rule in rules}
        return found

    def _exclusions(self, config: FalconH1Config) -> list[str]:
        """Return a rule for every module of the layers that stays float: "-:" and a regular expression of its name."""
        layers: dict[str, list[int]] = {}
        for name in tensor_shapes(config):
            layer, inner = split_layer(name)
            if layer is not None and projection_of(name) is not None and name not in self.tensors:
                layers.setdefault(inner.removesuffix(".weight"), []).append(layer)
        rules = []
        for module, found in layers.items():
            if len(found) == config.num_hidden_layers:
                rules.append(rf"-:.*\.{re.escape(module)}")
            else:
                rules += [rf"-:.*\.layers\.{layer}\.{re.escape(module)}" for layer in found]
        return rules


def _reason(name: str, precision: Precision, shape: tuple[int, ...], *, options: GptqOptions) -> str:
    """Return why a weight that the build has in integers stays float; empty where it is packed."""
    projection = projection_of(name)
    assert projection is not None, name
    if projection.part is ModelPart.EMBEDDING:
        return "the layout has no embeddings in integers"
    if projection.part.lower() in options.unpacked:
        return f"--unpacked {projection.part.lower()}"
    each = WORD // precision.bits
    for size, axis in zip(shape, ("rows", "columns"), strict=True):
        if size % each:
            return f"its {size} {axis} do not fill words of {each} codes"
    return ""


def _check_one_precision(packed: Mapping[str, Precision]) -> None:
    first, *others = packed.items() or [("", None)]
    for name, precision in others:
        if precision != first[1]:
            what = f'has another precision than "{first[0]}", and a folder in this layout has one for all'
            raise H1ExportError(
                f'tensor "{name}"', what, "give all weights one precision, or keep its part in floats with --unpacked"
            )
