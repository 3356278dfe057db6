"""Options of the target "gguf"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from h1export.targets.options import EMBEDDING, Flag, TargetOptions

Chosen = Literal["auto", "q4_0", "q4_k", "q5_0", "q5_k", "q6_k", "q8_0", "f16", "bf16", "f32"]
Table = Literal["auto", "int4", "int8", "fp16", "q4_0", "q4_k", "q5_0", "q5_k", "q6_k", "q8_0", "f16", "bf16", "f32"]
Mix = Literal["shared", "q4_k_m", "q5_k_m"]
Floats = Literal["f32", "f16", "bf16"]
Vocabulary = Literal["auto", "whole", "ids"]


@dataclass(frozen=True, kw_only=True)
class GgufOptions(TargetOptions):
    """What a build for llama.cpp can choose.

    Attributes:
        head: the type of the head's tensor.
        embedding: the type of the embedding's; of one tensor that is both, either option gives it. In a build with an
            int4 head, "auto" is Q6_K for both: at the bytes of the build's own int4 and int8 the two lose a third less
            (docs/gguf.md). In other builds, and where blocks of 256 columns do not fit, it is the build's own
            precision. int4, int8 and fp16 are those of every target.
        mix: "shared" stores the build's own integers, which other targets have too. The others are for int4 builds: a
            file that is no larger than llama.cpp's own of that name, whose types are llama.cpp's, chosen matrix by
            matrix (mix.py), and in which most integers are this target's own.
        floats: the type of matrices that the build does not store in integers.
        vocabulary: whether the file has the tokenizer: "whole", or "ids" for token ids alone. "auto" is "whole" where
            llama.cpp splits text as the tokenizer does.
    """

    head: Annotated[Chosen, Flag("Type of the head's tensor, and of a tied embedding.", default="auto")] = "auto"
    embedding: Annotated[Table, EMBEDDING] = "auto"
    mix: Annotated[
        Mix,
        Flag(
            "shared: the integers of other targets; else: llama.cpp's types, in no more bytes than its own file of "
            "that name.",
            later=True,
        ),
    ] = "shared"
    floats: Annotated[Floats, Flag("Type of matrices that are not in integers.")] = "f32"
    vocabulary: Annotated[
        Vocabulary,
        Flag("Whether the file has the tokenizer, or takes token ids alone; auto: whole where llama.cpp can split so."),
    ] = "auto"


Options = GgufOptions
