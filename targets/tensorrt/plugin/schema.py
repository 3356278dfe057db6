"""Generates the plugin's C++ header: the ops' inputs from their torch schemas, the kernels' arguments from launch.py.

The order of inputs, their dtypes, the attributes and the order of a kernel's arguments are therefore written once, in
Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from h1export.plugins import h1
from h1export.plugins.causal_conv import launch as conv
from h1export.plugins.gpu.kernel import ALIGNED, KERNEL_DTYPE
from h1export.plugins.ssm_scan import launch as scan

Arguments = tuple[tuple[str, str], ...]

# Namespace and version of both ops in TensorRT; csrc/plugin.h has them as kNamespace and kVersion.
NAMESPACE = "h1export"
VERSION = "1"
# torch's type of an attribute -> its C++ type, its name in PluginFieldType
FIELDS = {"int": ("int32_t", "kINT32"), "float": ("float", "kFLOAT32")}
SCALARS = {"i32": "int32_t", "fp32": "float"}  # Triton's type of a kernel's argument -> its C++ type


@dataclass(frozen=True)
class Op:
    """An op of the plugin.

    Attributes:
        name: name of the op in ONNX and TensorRT.
        space: C++ namespace of its generated code, and name of the op in torch.ops.h1.
        schema: torch's schema of the op.
        shapes: tensor input -> the names of its sizes, which the schema does not hold.
        kernels: kernel -> its arguments, as (name, type) in order.
        state: the input that output 1 replaces.
    """

    name: str
    space: str
    schema: Any
    shapes: Mapping[str, str]
    kernels: Mapping[str, Arguments]
    state: str = "state"

    @property
    def inputs(self) -> list[str]:
        """The tensor inputs in order; a graph passes zeros for an input that is optional in the schema."""
        return [argument.name for argument in self.schema.arguments if argument.name in self.shapes]

    @property
    def attributes(self) -> list[tuple[str, str]]:
        """(name, torch's type) of each argument that is not a tensor."""
        return [
            (argument.name, str(argument.type))
            for argument in self.schema.arguments
            if argument.name not in self.shapes
        ]

    def kind(self, name: str) -> str:
        """Return the kernels' type of an input: KERNEL_DTYPE (the op's dtype), or a pointer type independent of it."""
        (kind,) = {kind for arguments in self.kernels.values() for argument, kind in arguments if argument == name}
        return kind


OPS = (
    Op(
        "SSMScan",
        "ssm_scan",
        h1.ssm_scan.default._schema,
        shapes={
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
        kernels={
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
        shapes={
            "x": "batch tokens channels",
            "state": "batch channels kept",
            "weight": "channels one taps",
            "bias": "channels",
        },
        kernels={"causal_conv": conv.CAUSAL_CONV},
    ),
)


def header() -> str:
    """Return ops.h: a namespace for each op with its inputs, its attributes and the arguments of its kernels."""
    lines = [
        "// Generated from the ops' schemas and launch.py.",
        "#pragma once",
        "",
        "#include <cstdint>",
        "",
        '#include "tensors.h"',
        "",
        "namespace h1 {",
        f"constexpr uintptr_t kAligned = {ALIGNED};  // divides addresses, and the channels of the convolution",
        "}  // namespace h1",
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
    """Yield the op's name, the positions of its inputs and their descriptions."""
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
    """Yield the struct of the op's attributes and the list of its plugin fields."""
    yield "struct Attributes {"
    yield from (f"  {FIELDS[kind][0]} {name}{{}};" for name, kind in op.attributes)
    yield "};"
    fields = [
        f'{{"{name}", PluginFieldType::{FIELDS[kind][1]}, offsetof(Attributes, {name})}}'
        for name, kind in op.attributes
    ]
    yield f"inline std::vector<Field> fields() {{ return {{{', '.join(fields)}}}; }}"


def _call(op: Op) -> Iterator[str]:
    """Yield the struct of all kernel arguments, the function that fills it and one argument list per kernel."""
    every = {name: kind for arguments in op.kernels.values() for name, kind in arguments}
    yield "struct Call {"
    for name, kind in every.items():
        yield f"  {'void const*' if kind.startswith('*') else SCALARS[kind]} {name}{{}};"
    yield "};"
    parameters = "Call& call, void const* const* inputs, void* const* outputs, Attributes const& attributes"
    yield f"inline void bind({parameters}) {{"
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
    """Return the C++ constant of an input: "dt_bias" gives kDtBias."""
    return "k" + "".join(part[:1].upper() + part[1:] for part in name.split("_"))
