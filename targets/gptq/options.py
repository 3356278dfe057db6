"""Options of the target "gptq"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from h1export.targets.options import Flag, TargetOptions

Part = Literal["mamba", "attention", "mlp", "head"]


@dataclass(frozen=True, kw_only=True)
class GptqOptions(TargetOptions):
    """What a build of a GPTQ folder can choose.

    Attributes:
        unpacked: the parts of the model whose weights stay floats, as the checkpoint stores them.
    """

    unpacked: Annotated[
        tuple[Part, ...],
        Flag(
            "Part of the model whose weights stay floats, for an engine that has no integer kernel there; "
            "give the option once for each part."
        ),
    ] = ()


Options = GptqOptions
