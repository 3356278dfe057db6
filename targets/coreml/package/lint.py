"""The linter of an .mlpackage: it finds faults that a device would reject, or would accept with wrong results.

Each rule is a small function over the saved package; CHECKS lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from h1export.errors import H1ExportError
from h1export.targets.coreml import sdk
from h1export.targets.coreml.evaluator import Evaluator, Package
from h1export.targets.coreml.evaluator.package import stored_values
from h1export.targets.coreml.evaluator.program import Function, Operation, TensorType, Value
from h1export.targets.coreml.program import layout

# the limits of a tensor: a vocabulary fits, and Core ML has no tensors of rank 6
LARGEST_DIM = 1 << 18
LARGEST_RANK = 5
# the limits of the Neural Engine: the largest dimension of a tensor, and what divides the last dimension of a state
NE_DIM = 1 << 14
NE_MULTIPLE = 32
UNSUPPORTED_DTYPES = ("int64", "uint64", "fp64")  # Core ML narrows them without a warning


@dataclass(frozen=True)
class Finding:
    """A fault: the name of the check that found it, the operation or function that has it, and a description."""

    rule: str
    where: str
    what: str


Check = Callable[[Package], Iterator[Finding]]


def lint(package: Package, neural_engine: bool = False) -> list[Finding]:
    """Return every fault that the checks find, in the order of CHECKS; a check that raises an error is a fault too.

    ``neural_engine`` adds the faults that only matter on the Neural Engine.
    """
    found: list[Finding] = []
    checks = CHECKS | ({on_neural_engine.__name__: on_neural_engine} if neural_engine else {})
    for name, check in checks.items():
        try:
            found += check(package)
        except H1ExportError as error:
            found.append(Finding(name, error.where, error.what))
    return found


def _operations(package: Package) -> Iterator[tuple[Function, Operation]]:
    for function in package.functions.values():
        for operation in function.block.walk():
            yield function, operation


def _values(operation: Operation) -> Iterator[tuple[str, Value]]:
    """Yield the constants that an operation stores itself."""
    yield from operation.attributes.items()
    yield from (
        (name, argument)
        for name, arguments in operation.inputs.items()
        for argument in arguments
        if isinstance(argument, Value)
    )


def operations(package: Package) -> Iterator[Finding]:
    """Find ops, attributes and types that the evaluator does not have."""
    for name in package.functions:
        try:
            Evaluator(package, name, without_weights=True)
        except H1ExportError as error:
            yield Finding("operations", error.where, error.what)


def types(package: Package) -> Iterator[Finding]:
    """Find 64-bit numbers."""
    for _, operation in _operations(package):
        kinds = [kind for _, kind in operation.outputs] + [value.type for _, value in _values(operation)]
        for kind in kinds:
            if kind.dtype.name in UNSUPPORTED_DTYPES:
                yield Finding("types", operation.where, f"has {kind}")


def constants(package: Package) -> Iterator[Finding]:
    """Find constants that cannot be read from their file, or are not finite."""
    for _, operation in _operations(package):
        for name, value in _values(operation):
            try:
                array = value.array()
            except H1ExportError as error:
                yield Finding("constants", error.where, error.what)
                continue
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                yield Finding("constants", operation.where, f"{name} has values that are not finite")


def blocks(package: Package) -> Iterator[Finding]:
    """Find scales whose sizes do not divide those of their integers."""
    for function, operation in _operations(package):
        if operation.type == "constexpr_blockwise_shift_scale":
            data, scale = (stored_values(operation, function.block)[name].type.shape for name in ("data", "scale"))
            if len(data) != len(scale) or any(
                not part or (whole or 0) % part for whole, part in zip(data, scale, strict=True)
            ):
                yield Finding("blocks", operation.where, f"has integers {list(data)} and scales {list(scale)}")


def states(package: Package) -> Iterator[Finding]:
    """Find functions that do not read and write the same states; one state object serves all functions."""
    declared: dict[str, TensorType] = {}
    for name, function in package.functions.items():
        if declared and function.states != declared:
            differ = {
                key for key in declared.keys() | function.states.keys() if declared.get(key) != function.states.get(key)
            }
            yield Finding(
                "states", f"function {name!r}", f"has other states than the one before: {', '.join(sorted(differ))}"
            )
        declared = dict(function.states)
        for kind in ("read_state", "write_state"):
            touched = {argument for op in function.block.walk() if op.type == kind for argument in op.inputs["input"]}
            for state in function.states.keys() - touched:
                yield Finding("states", f"function {name!r}", f"has no {kind} of {state!r}")


def dimensions(package: Package) -> Iterator[Finding]:
    """Find tensors with a dimension of 0 or known at run time only, and a dimension or rank that is too large."""
    for _, operation in _operations(package):
        for name, kind in operation.outputs:
            if len(kind.shape) > LARGEST_RANK or not all(size and size <= LARGEST_DIM for size in kind.shape):
                yield Finding("dimensions", operation.where, f"output {name!r} is {kind}")


def calls(package: Package) -> Iterator[Finding]:
    """Find ops that fail, or compute another shape than they declare, in a call of each function.

    If the metadata states the maximum context, the call is on its last tokens, and a call one token further must fail.
    """
    max_context = dict(package.model.description.metadata.userDefined).get(layout.MAX_CONTEXT, "")
    for name, function in package.functions.items():
        if not (max_context.isdigit() and {layout.POSITION, layout.INPUT_IDS} <= function.inputs.keys()):
            yield from _run(package, name, {})
            continue
        last = int(max_context) - int(function.inputs[layout.INPUT_IDS].shape[-1] or 1)
        yield from _run(package, name, {layout.POSITION: last})
        if not list(_run(package, name, {layout.POSITION: last + 1})):
            yield Finding(
                "calls",
                f"function {name!r}",
                f"writes beyond its maximum context of {max_context} tokens without an error",
            )


def _run(package: Package, name: str, given: Mapping[str, int]) -> Iterator[Finding]:
    """Find errors in a call on ones, or on ``given`` for some inputs; no large weight is read."""
    try:
        evaluator = Evaluator(package, name, without_weights=True)
        inputs = {
            key: np.full([size or 1 for size in kind.shape], given.get(key, 1), kind.dtype.array)
            for key, kind in evaluator.function.inputs.items()
        }
        evaluator.run(inputs, evaluator.initial_states())
    except H1ExportError as error:
        yield Finding("calls", error.where, error.what)


def reload(package: Package) -> Iterator[Finding]:
    """Find what the reader and the validation of coremltools reject."""
    loader = sdk.module("coremltools.converters.mil.frontend.milproto.load")
    weights = str(package.weights) if package.weights.is_dir() else ""
    try:
        loader.load(
            package.model, specification_version=package.model.specificationVersion, file_weights_dir=weights
        ).validate()
    except Exception as error:  # the exceptions of its ops are of many types
        yield Finding("reload", str(package.path), f"coremltools reports {type(error).__name__}: {str(error)[:200]}")


def on_neural_engine(package: Package) -> Iterator[Finding]:
    """Find what the Neural Engine does not support.

    These are states with an unsupported last dimension, tensors that are too wide, and scales per group of columns,
    whose results others have found to be wrong there without an error.
    """
    for name, function in package.functions.items():
        for state, kind in function.states.items():
            if (kind.shape[-1] or 0) % NE_MULTIPLE:
                yield Finding(
                    "on_neural_engine",
                    f"function {name!r}",
                    f"state {state!r} is {kind}, whose last dimension is not a multiple of {NE_MULTIPLE}",
                )
    for _, operation in _operations(package):
        if operation.type == "constexpr_blockwise_shift_scale":
            yield Finding("on_neural_engine", operation.where, "has scales per group")
        elif not operation.constant and any(
            (size or 0) > NE_DIM for _, kind in operation.outputs for size in kind.shape
        ):
            yield Finding(
                "on_neural_engine",
                operation.where,
                f"is wider than {NE_DIM}: {', '.join(str(kind) for _, kind in operation.outputs)}",
            )


def description(package: Package) -> Iterator[Finding]:
    """Find differences between the model's description of its functions and its program."""
    described = {function.name: function for function in package.model.description.functions}
    for name in package.functions.keys() ^ described.keys():
        yield Finding("description", f"function {name!r}", "is in only one of program and description")
    for name in package.functions.keys() & described.keys():
        function = package.functions[name]
        pairs: Mapping[str, tuple[set[str], set[str]]] = {
            "inputs": (set(function.inputs), {feature.name for feature in described[name].input}),
            "outputs": (set(function.outputs), {feature.name for feature in described[name].output}),
            "states": (set(function.states), {feature.name for feature in described[name].state}),
        }
        for what, (in_program, in_description) in pairs.items():
            if in_program != in_description:
                yield Finding(
                    "description",
                    f"function {name!r}",
                    f"{what} {sorted(in_program ^ in_description)} are in only one of program and description",
                )


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (operations, types, constants, blocks, states, dimensions, description, calls, reload)
}
