"""The C++ headers that the plugin's sources rest on, generated: the ops' inputs from their schemas, the kernels' arguments from launch.py.

So the order of inputs, their dtypes, the attributes and the order of a kernel's arguments are written once, in Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from h1export.plugins import h1
from h1export.plugins.causal_conv import launch as conv
from h1export.plugins.gpu.kernel import KERNEL_DTYPE
from h1export.plugins.ssm_scan import launch as scan

Arguments = tuple[tuple[str, str], ...]

# of both ops in TensorRT: kNamespace and kVersion of csrc/plugin.h
NAMESPACE = "h1export"
VERSION = "1"
FIELDS = {
    "int": ("int32_t", "kINT32"),
    "float": ("float", "kFLOAT32"),
}  # Torch's type of an attribute -> C++'s, PluginFieldType's
SCALARS = {"i32": "int32_t", "fp32": "float"}  # Triton's type of a kernel's argument -> C++'s


@dataclass(frozen=True)
class Op:
    """``shapes``: the sizes of each input by name, which the schema cannot say; ``state``: the input that output 1 replaces."""

    name: str  # in ONNX and TensorRT
    space: str  # of its generated code
    schema: Any
    shapes: Mapping[str, str]
    kernels: Mapping[str, Arguments]
    state: str = "state"

    @property
    def inputs(self) -> list[str]:
        """Tensors, in order. One that the schema has optional is an input like others: a graph gives zeros."""
        return [argument.name for argument in self.schema.arguments if argument.name in self.shapes]

    @property
    def attributes(self) -> list[tuple[str, str]]:
        """(name, Torch's type) of what follows the tensors."""
        return [
            (argument.name, str(argument.type))
            for argument in self.schema.arguments
            if argument.name not in self.shapes
        ]

    def kind(self, name: str) -> str:
        """Of an input: KERNEL_DTYPE, or a pointer type that is the same whatever the op's dtype."""
        (kind,) = {kind for arguments in self.kernels.values() for argument, kind in arguments if argument == name}
        return kind


OPS = (
    Op(
        "SSMScan",
        "ssm_scan",
        h1.ssm_scan.default._schema,
        {
            "x": "batch tokens heads d_head",
            "dt": "batch tokens heads",
            "A": "heads",
            "B": "batch tokens groups d_state",
            "C": "batch tokens groups d_state",
            "D": "heads",
            "dt_bias": "heads",
            "state": "batch heads d_head d_state",
            "mask": "batch tokens",
        },
        {
            "chunk_state": scan.CHUNK_STATE,
            "state_passing": scan.STATE_PASSING,
            "chunk_scan": scan.CHUNK_SCAN,
            "decode": scan.DECODE,
        },
    ),
    Op(
        "CausalConv",
        "causal_conv",
        h1.causal_conv.default._schema,
        {
            "x": "batch tokens channels",
            "state": "batch channels kept",
            "weight": "channels one taps",
            "bias": "channels",
        },
        {"causal_conv": conv.CAUSAL_CONV},
    ),
)


def header() -> str:
    """ops.h: a namespace for each op, with its inputs, its attributes and a Call that holds all arguments of its kernels."""
    lines = [
        "// Generated from the ops' schemas and launch.py.",
        "#pragma once",
        "",
        "#include <cstdint>",
        "",
        '#include "tensors.h"',
        "",
    ]
    for op in OPS:
        lines += [
            f"namespace h1::{op.space} {{",
            *_inputs(op),
            *_attributes(op),
            *_call(op),
            f"}}  // namespace h1::{op.space}",
            "",
        ]
    return "\n".join(lines)


def _inputs(op: Op) -> Iterator[str]:
    names = op.inputs
    yield f'constexpr char const* kName = "{op.name}";'
    yield "enum Input : int32_t { " + ", ".join(f"{_constant(name)} = {i}" for i, name in enumerate(names)) + " };"
    yield f"constexpr Tensor kInputs[] = {{  // {', '.join(names)}"
    for name in names:
        sizes = op.shapes[name].split()
        texts = ", ".join(f'"{size}"' for size in sizes)
        yield f'    {{"{name}", {"true" if op.kind(name) == KERNEL_DTYPE else "false"}, {len(sizes)}, {{{texts}}}}},'
    yield "};"
    yield f"constexpr int32_t kStateInput = {_constant(op.state)};"


def _attributes(op: Op) -> Iterator[str]:
    yield "struct Attributes {"
    yield from (f"  {FIELDS[kind][0]} {name}{{}};" for name, kind in op.attributes)
    yield "};"
    fields = [
        f'{{"{name}", PluginFieldType::{FIELDS[kind][1]}, offsetof(Attributes, {name})}}'
        for name, kind in op.attributes
    ]
    yield f"inline std::vector<Field> fields() {{ return {{{', '.join(fields)}}}; }}"


def _call(op: Op) -> Iterator[str]:
    every = {name: kind for arguments in op.kernels.values() for name, kind in arguments}
    yield "struct Call {"
    for name, kind in every.items():
        yield f"  {'void const*' if kind.startswith('*') else SCALARS[kind]} {name}{{}};"
    yield "};"
    yield "inline void bind(Call& call, void const* const* inputs, void* const* outputs, Attributes const& attributes) {"
    yield from (f"  call.{name} = inputs[{_constant(name)}];" for name in op.inputs if name in every)
    yield from (f"  call.{name} = outputs[{i}];" for i, name in enumerate(("y", f"new_{op.state}")))
    yield from (f"  call.{name} = attributes.{name};" for name, _ in op.attributes if name in every)
    yield "  static_cast<void>(attributes);"
    yield "}"
    for kernel, arguments in op.kernels.items():
        yield f"inline std::vector<void*> {kernel}_arguments(Call& call) {{"
        yield "  return pointers({" + ", ".join(f"&call.{name}" for name, _ in arguments) + "});"
        yield "}"


def _constant(name: str) -> str:
    return "k" + "".join(part[:1].upper() + part[1:] for part in name.split("_"))
