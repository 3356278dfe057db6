"""Options of the target "ort"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from h1export.errors import H1ExportError
from h1export.quantize.choices import AUTO, Embedding
from h1export.targets.options import EMBEDDING, Flag, TargetOptions

Graph = Literal["cpu", "cuda", "portable", "wasm"]
Activations = Literal["fp16", "bf16"]
LayoutName = Literal["genai", "transformers.js"]
Kv = Literal["auto", "fp16", "int8", "fp32"]

# The accuracy levels that the products of a graph have, the default first. Those of the portable graph become
# MatMulNBits in ONNX Runtime on CPUs.
LEVELS: Mapping[Graph, tuple[int, ...]] = {"cpu": (4, 0, 1), "cuda": (0,), "portable": (4, 0, 1), "wasm": (0,)}
DEFAULT_LEVEL = -1  # stands for the graph's own default until the options are made


@dataclass(frozen=True, kw_only=True)
class OrtOptions(TargetOptions):
    """What a build for ONNX Runtime can choose.

    Attributes:
        embedding: the precision of the embedding.
        graph: which of the GRAPH_VARIANTS is made.
        activations: the dtype of activations, keys, values and convolution states in the graph of --graph cuda; the
            other graphs have float32.
        captured_decode: whether sessions of the graph of --graph cuda replay a CUDA graph for a call of one token.
        kv: the dtype of keys and values of --graph cpu; int8: rows of int8_rows.py; auto: fp16 beside weights in
            integers, and float32 beside weights in floats, where a build is exact. Those of --graph cuda have the dtype
            of its activations, and those of the other graphs float32.
        layout: which of the LAYOUTS names the files, inputs and outputs.
        accuracy_level: of MatMulNBits: 0 computes in float32, 4 rounds activations to int8, which is fastest.
    """

    embedding: Annotated[Embedding, EMBEDDING] = AUTO
    graph: Annotated[
        Graph,
        Flag(
            "What runs the graph: cpu and cuda use ONNX Runtime's own operators, portable only those of ONNX, "
            "for any runtime; wasm unpacks integers once, for browsers."
        ),
    ] = "cpu"
    activations: Annotated[
        Activations,
        Flag("Dtype of the activations of --graph cuda; bf16 has the range of float32.", later=True),
    ] = "fp16"
    captured_decode: Annotated[
        bool,
        Flag("With --graph cuda, capture a call of one token as a CUDA graph and replay it.", later=True),
    ] = False
    layout: Annotated[
        LayoutName,
        Flag("The client whose names of files, inputs and outputs the artifact has.", later=True),
    ] = "genai"
    kv: Annotated[
        Kv,
        Flag(
            "Dtype of keys and values with --graph cpu; fp16 halves what a token at a great depth reads, int8 nearly "
            "halves it again, and auto is fp16 beside weights in integers.",
            later=True,
        ),
    ] = AUTO
    accuracy_level: Annotated[
        int,
        Flag(
            "Products with integers: 4 rounds activations to int8, which is fast, and 0 keeps float32.",
            minimum=0,
            default=", ".join(f"{graph}: {levels[0]}" for graph, levels in LEVELS.items()),
        ),
    ] = DEFAULT_LEVEL

    def __post_init__(self) -> None:
        if self.accuracy_level == DEFAULT_LEVEL and self.graph in LEVELS:
            object.__setattr__(self, "accuracy_level", LEVELS[self.graph][0])
        super().__post_init__()
        levels = LEVELS[self.graph]
        if self.accuracy_level not in levels:
            what = f"{self.accuracy_level} is not a level that the kernels of --graph {self.graph} have"
            raise H1ExportError("--accuracy-level", what, f"one of {', '.join(map(str, levels))}")
        if self.activations == "bf16" and self.graph != "cuda":
            what = f"bf16 is not a dtype that the activations of --graph {self.graph} have"
            raise H1ExportError("--activations", what, "use --graph cuda, or leave --activations out")
        if self.embedding == "fp16" and self.activations == "bf16":
            raise H1ExportError("--embedding", "fp16 is not a dtype that --activations bf16 stores", "use int8 or int4")
        if self.captured_decode and self.graph != "cuda":
            what = f"--graph {self.graph} has no CUDA graph to capture"
            raise H1ExportError("--captured-decode", what, "use --graph cuda, or leave --captured-decode out")
        if self.kv != AUTO and self.graph == "cuda":
            what = "keys and values of --graph cuda have the dtype of its activations"
            raise H1ExportError("--kv", what, "use --activations, and leave --kv out")
        if self.kv in ("fp16", "int8") and not self.narrow_cache:
            what = f"{self.kv} is a dtype that only --graph cpu with --layout genai has for keys and values"
            raise H1ExportError("--kv", what, "use fp32, or leave --kv out")
        if self.layout == "transformers.js" and self.graph == "cuda":
            what = "transformers.js runs on CPUs, in WebAssembly and on WebGPU, and --graph cuda on none of them"
            raise H1ExportError("--layout", what, "use --graph cpu, wasm or portable, or leave --layout out")

    @property
    def narrow_cache(self) -> bool:
        """Whether keys and values can have fewer bits than activations in float32.

        transformers.js allocates them in float32, by what config.json says.
        """
        return self.graph == "cpu" and self.layout == "genai"

    @property
    def asks_for_logits(self) -> bool:
        """Whether a call says how many of its last positions get logits, by an input of the graph.

        The graph of --graph cuda has no such input: the arithmetic with it would run on the GPU, and its result would
        be copied to the CPU, where a slice has its bounds. A call with such a copy cannot be captured.
        """
        return self.graph != "cuda"

    @property
    def traces_last(self) -> bool:
        return self.asks_for_logits or self.last_logits


Options = OrtOptions
