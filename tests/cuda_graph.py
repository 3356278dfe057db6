"""What tests of the graph of --graph cuda share: the CUDA kernels' dtypes, and the rows of a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.progress import SILENT
from h1export.report.report import Row
from h1export.validate.accuracy.run import ValidateOptions, validate

EXACT = 1e-5  # of the range; float32 leaves 3e-6 on these depths

FLOAT, HALF, BF16, INT32, INT64, UINT8, BOOL = (
    getattr(TensorProto, name) for name in ("FLOAT", "FLOAT16", "BFLOAT16", "INT32", "INT64", "UINT8", "BOOL")
)
REAL = frozenset({FLOAT, HALF, BF16})
INTEGERS = frozenset({INT32, INT64})
MS = "com.microsoft"

# (operator, domain) -> the dtypes of the first input that its CUDA kernel takes, of those that the graph could have.
# Source: the CUDA section of onnxruntime's docs/OperatorKernels.md, generated from the registered kernels, as of
# onnxruntime-gpu 1.31.
KERNELS: Mapping[tuple[str, str], frozenset[int]] = {
    ("Add", ""): REAL | INTEGERS,
    ("And", ""): frozenset({BOOL}),
    ("Cast", ""): REAL | INTEGERS | {BOOL},
    ("Clip", ""): (REAL | INTEGERS) - {BF16},
    ("Concat", ""): REAL | INTEGERS,
    ("Cos", ""): REAL - {BF16},
    ("CumSum", ""): (REAL | INTEGERS) - {BF16},
    ("Equal", ""): REAL | INTEGERS | {BOOL},
    ("Expand", ""): REAL | INTEGERS,
    ("Gather", ""): REAL | INTEGERS,
    ("Mul", ""): REAL | INTEGERS,
    ("Or", ""): frozenset({BOOL}),
    ("Range", ""): INTEGERS,
    ("RMSNormalization", ""): REAL,
    ("Reshape", ""): REAL | INTEGERS,
    ("RotaryEmbedding", ""): REAL,
    ("Shape", ""): REAL | INTEGERS,
    ("Sin", ""): REAL - {BF16},
    ("Slice", ""): REAL | INTEGERS,
    ("Softplus", ""): REAL - {BF16},
    ("Split", ""): REAL | INTEGERS,
    ("Squeeze", ""): REAL | INTEGERS,
    ("Sub", ""): REAL | INTEGERS,
    ("Unsqueeze", ""): REAL | INTEGERS,
    ("Where", ""): frozenset({BOOL}),
    ("CausalConvWithState", MS): REAL,
    ("FusedMatMul", MS): REAL,
    ("GatedDeltaNet", MS): REAL,
    ("GatherBlockQuantized", MS): frozenset({UINT8}),
    ("GroupQueryAttention", MS): frozenset({HALF, BF16}),  # none for float32
    ("MatMulNBits", MS): REAL,
    ("QuickGelu", MS): REAL,
    ("SkipSimplifiedLayerNormalization", MS): REAL,
}


def dtypes(model: onnx.ModelProto) -> dict[str, int]:
    """Value -> element type; operators give out what they take in first, with the exceptions named here."""
    known = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    known |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        given = known[node.input[0]]
        if node.op_type == "Cast":
            given = next(attribute.i for attribute in node.attribute if attribute.name == "to")
        elif node.op_type == "Shape":
            given = INT64
        elif node.op_type == "Equal":
            given = BOOL
        elif node.op_type == "Where":
            given = known[node.input[1]]
        elif node.op_type == "GatherBlockQuantized":
            given = known[node.input[2]]
        for place, name in enumerate(node.output):
            known[name] = FLOAT if node.op_type == "GatedDeltaNet" and place == 1 else given
    return known


def load(artifact: Artifact) -> onnx.ModelProto:
    return onnx.load(artifact.folder / "model.onnx", load_external_data=False)


def assert_kernels(model: onnx.ModelProto) -> None:
    found = dtypes(model)
    for node in model.graph.node:
        assert found[node.input[0]] in KERNELS[node.op_type, node.domain], node
    for node in model.graph.node:  # no operator adds 16 bits to float32
        mixed = {found[name] for name in node.input if name} & REAL
        assert len(mixed) <= 1 or node.op_type in ("GatedDeltaNet", "MatMulNBits"), node
    declared = {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
    assert declared == {name: found[name] for name in declared}


def rows(artifact: Artifact, checkpoint: Path, shipped: Any, against: str) -> list[Row]:
    report = validate(
        artifact,
        shipped,
        load_runner(artifact, float32=True),
        checkpoint=checkpoint,
        options=ValidateOptions(pairs=0),
        progress=SILENT,
    )
    assert report.passed, report.to_json()
    found = [row for row in report.rows if row.comparison == against and row.compares_outputs]
    assert len(found) == 8
    return found


def worst(found: list[Row]) -> float:
    return max(max(row.figures["logits"], row.figures["states"]) for row in found)


# operator -> the inputs that its CUDA kernel reads on the CPU. Source: InputMemoryType in the kernels' registrations,
# onnxruntime/core/providers/cuda/ and contrib_ops/cuda/. Shape is the one kernel here whose output is on the CPU.
READ_ON_CPU: Mapping[str, frozenset[int]] = {
    "Clip": frozenset({1, 2}),
    "CumSum": frozenset({1}),
    "Expand": frozenset({1}),
    "GroupQueryAttention": frozenset({6}),
    "Pad": frozenset({1, 2, 3}),
    "Range": frozenset({0, 1, 2}),
    "Reshape": frozenset({1}),
    "Slice": frozenset({1, 2, 3, 4}),
    "Split": frozenset({1}),
    "Squeeze": frozenset({1}),
    "Unsqueeze": frozenset({1}),
}
SMALL = 100  # elements of an initializer that a node on the CPU may have


def copies(model: onnx.ModelProto) -> list[str]:
    """Return the values that go between the CPU and the device, each of which keeps ONNX Runtime from capturing.

    A node goes to the CPU where all it reads is on the CPU, or small and constant, or an input of the graph, and it is
    not one whose CUDA kernel reads just that on the CPU. Source: GetCpuPreferredNodes in
    onnxruntime/core/framework/fallback_cpu_capability.cc.
    """
    constant = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    inputs = {value.name for value in model.graph.input}
    found = dtypes(model)
    on_cpu: set[str] = set()
    copied = []
    for node in model.graph.node:
        read = READ_ON_CPU.get(node.op_type, frozenset())
        names = {place: name for place, name in enumerate(node.input) if name}

        def may_move(place: int, name: str, read: frozenset[int] = read) -> bool:
            if found.get(name) in (HALF, BF16):
                return False
            return constant.get(name, SMALL + 1) <= SMALL or name in inputs or (name in on_cpu and place not in read)

        moved = bool(on_cpu & set(names.values())) and all(may_move(*named) for named in names.items())
        for place, name in names.items():
            if name not in constant and (name in on_cpu) != (moved or place in read):
                copied.append(f"{node.op_type} {name}")
        if moved or node.op_type == "Shape":
            on_cpu.update(node.output)
    return copied
