"""Options of the target "gptq"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from h1export.targets.options import EMBEDDING, Flag, TargetOptions

Part = Literal["mamba", "attention", "mlp", "head"]


@dataclass(frozen=True, kw_only=True)
class GptqOptions(TargetOptions):
    """What a build of a GPTQ folder can choose.

    Attributes:
        embedding: the layout has embeddings in floats only, by default in the checkpoint's own dtype.
        unpacked: the parts of the model whose weights stay floats, as the checkpoint stores them.
    """

    embedding: Annotated[Literal["auto", "fp16"], EMBEDDING] = "auto"
    unpacked: Annotated[
        tuple[Part, ...],
        Flag(
            "Part of the model whose weights stay floats, for an engine that has no integer kernel there; "
            "give the option once for each part."
        ),
    ] = ()


Options = GptqOptions
