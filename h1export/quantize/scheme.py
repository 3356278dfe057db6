"""QuantScheme: which tensor gets which precision. The only place that decides it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import EMBEDDING, LM_HEAD, tensor_layout
from h1export.quantize.precision import INT8, Precision

QuantName = Literal["none", "int8", "int4"]
Method = Literal["rtn", "search", "awq", "gptq"]
PREQUANTIZED = "ready"  # in place of a method: the checkpoint had integers already
BEST: Mapping[QuantName, Method] = {
    "none": "rtn",
    "int8": "rtn",
    "int4": "gptq",
}  # int8 loses nothing that a method could save
GROUP_SIZES = (32, 64, 128)
PROJECTIONS = (
    "mamba.in_proj.weight",
    "mamba.out_proj.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "feed_forward.gate_proj.weight",
    "feed_forward.up_proj.weight",
    "feed_forward.down_proj.weight",
    LM_HEAD,
)


@dataclass(frozen=True)
class QuantScheme:
    """``quant`` for the projections and the head; ``group_size`` columns share an int4 scale; ``method`` chooses the integers.

    rtn rounds each weight to the nearest code; search looks for the scales that leave the least error; awq and gptq look at what goes
    into each product on a calibration text.

    int4 and int8 also store the embedding in integers. In an int4 build a tied one shares its head's int4, and an untied one is int8:
    only one row of it is read per token, so 4 bits would cost accuracy and buy no speed.

    ``chosen`` are tensors with a precision of their own, in place of ``quant``.
    """

    quant: QuantName = "int4"
    group_size: int = 32
    method: Method = "rtn"
    chosen: Mapping[str, QuantName] = field(default_factory=dict)

    @property
    def calibrated(self) -> bool:
        """Whether the method needs a calibration text."""
        return self.method in ("awq", "gptq")

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise H1ExportError("--method", f"{self.method!r} is unknown", f"one of {', '.join(get_args(Method))}")
        if self.quant == "none" and self.method != "rtn":
            raise H1ExportError(
                "--method", f"{self.method} has nothing to do with --quant none", "leave out one of the two"
            )
        if self.quant not in get_args(QuantName):
            raise H1ExportError("--quant", f"{self.quant!r} is unknown", f"one of {', '.join(get_args(QuantName))}")
        if self.group_size not in GROUP_SIZES:
            raise H1ExportError(
                "--group-size", f"{self.group_size} is not a group size", f"one of {', '.join(map(str, GROUP_SIZES))}"
            )

    def precision(self, tensor: str, config: FalconH1Config) -> Precision | None:
        """The integers that checkpoint tensor ``tensor`` is stored in; None: it stays float32."""
        quant = self.chosen.get(tensor, self.quant)
        if quant == "none" or not tensor.endswith((*PROJECTIONS, EMBEDDING)):
            return None
        untied_embedding = tensor == EMBEDDING and not config.tie_word_embeddings
        return INT8 if quant == "int8" or untied_embedding else Precision(4, self.group_size)

    def precisions(self, config: FalconH1Config) -> dict[str, Precision]:
        """Those of all tensors that are stored in integers."""
        return {name: precision for name in tensor_layout(config) if (precision := self.precision(name, config))}

    def check(self, config: FalconH1Config) -> None:
        """Raises H1ExportError where a group does not divide a tensor's width, or a chosen tensor is none that has a choice."""
        for name, quant in self.chosen.items():
            if name not in tensor_layout(config) or not name.endswith((*PROJECTIONS, EMBEDDING)):
                raise H1ExportError(
                    f'tensor "{name}"', "is no weight that this model could store in integers", "correct --precisions"
                )
            if name == EMBEDDING and not config.tie_word_embeddings and quant == "int4":
                raise H1ExportError(
                    f'tensor "{name}"', "is never int4 where it is not the head", "correct --precisions"
                )
        grouped = {
            name: precision.group_size for name, precision in self.precisions(config).items() if precision.group_size
        }
        widths = {name: tensor_layout(config)[name][-1] for name in grouped}
        for name, group_size in grouped.items():
            if widths[name] % group_size:
                what = f"has {widths[name]} columns, which groups of {group_size} do not divide"
                suits = [size for size in GROUP_SIZES if not any(width % size for width in widths.values())]
                raise H1ExportError(
                    f'tensor "{name}"', what, f"use --group-size {suits[-1]}" if suits else "use --quant int8"
                )
