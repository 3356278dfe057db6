"""QuantScheme decides the precision of every tensor and the method that chooses its integers; no other module does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import get_args

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import EMBEDDING, projection_of, tensor_shapes
from h1export.quantize.choices import GROUP_SIZES, OF_EMBEDDING, Method, QuantName, Step, parse_method
from h1export.quantize.precision import INT8, Precision

ADAPTERS = "adapters"  # the key of a manifest's scheme that lists the adapters that were merged
PREQUANTIZED = "prequantized"  # the method that a manifest records where the checkpoint had integers already


@dataclass(frozen=True)
class QuantScheme:
    """The settings of quantisation.

    int4 and int8 also store the embedding in integers. In an int4 build a tied embedding shares the head's int4, and an
    untied one is int8 unless it is chosen: only one row of it is read per token, so that 4 bits would cost accuracy and
    buy no speed.

    Attributes:
        quant: the precision of the projections and the head.
        group_size: columns that share an int4 scale.
        method: how integers are chosen. rtn rounds each weight to the nearest code; search looks for the scales that
            leave the least error in the weights; awq and gptq observe the inputs of every projection on a calibration
            text. Steps may follow, which tune the integers by the model's predictions, as in gptq+scales.
        chosen: checkpoint tensor -> the precision that it has in place of ``quant``.
    """

    quant: QuantName = "int4"
    group_size: int = 32
    method: str = "rtn"
    chosen: Mapping[str, QuantName] = field(default_factory=dict)

    @property
    def calibrated(self) -> bool:
        """Whether the method needs a calibration text."""
        return self.base in ("awq", "gptq") or bool(self.steps)

    @property
    def base(self) -> Method:
        """The method without the steps that follow it."""
        return parse_method(self.method)[0]

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps that follow the method, in order."""
        return parse_method(self.method)[1]

    def with_embedding(self, choice: str) -> QuantScheme:
        """Returns the scheme with the embedding in the precision of OF_EMBEDDING; itself for any other ``choice``."""
        quant = OF_EMBEDDING.get(choice)
        return self if quant is None else replace(self, chosen={**self.chosen, EMBEDDING: quant})

    def __post_init__(self) -> None:
        parse_method(self.method)
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
        """Returns the precision that checkpoint tensor ``tensor`` is stored in, or None where it stays float32."""
        quant = self.chosen.get(tensor, self.quant)
        if quant == "none" or projection_of(tensor) is None:
            return None
        untied_embedding = tensor == EMBEDDING not in self.chosen and not config.tie_word_embeddings
        return INT8 if quant == "int8" or untied_embedding else Precision(4, self.group_size)

    def precisions(self, config: FalconH1Config) -> dict[str, Precision]:
        """Returns the precisions of all tensors that are stored in integers, by checkpoint name."""
        return {name: precision for name in tensor_shapes(config) if (precision := self.precision(name, config))}

    def check(self, config: FalconH1Config) -> None:
        """Check the scheme against a model.

        Raises:
            H1ExportError: the group size does not divide a tensor's columns, or ``chosen`` names a tensor that has no
                choice.
        """
        shapes = tensor_shapes(config)
        for name in self.chosen:
            if name not in shapes or projection_of(name) is None:
                raise H1ExportError(
                    f'tensor "{name}"', "is no weight that this model could store in integers", "correct --precisions"
                )
        grouped = {
            name: precision.group_size for name, precision in self.precisions(config).items() if precision.group_size
        }
        widths = {name: shapes[name][-1] for name in grouped}
        for name, group_size in grouped.items():
            if widths[name] % group_size:
                what = f"has {widths[name]} columns, which groups of {group_size} do not divide"
                suits = [size for size in GROUP_SIZES if not any(width % size for width in widths.values())]
                raise H1ExportError(
                    f'tensor "{name}"', what, f"use --group-size {suits[-1]}" if suits else "use --quant int8"
                )
