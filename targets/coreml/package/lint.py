"""What is wrong with a package before a device says so, or does not: one small check a rule, each over the package as saved."""

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

# of a tensor: a vocabulary fits; Core ML has no tensors of rank 6
LARGEST_DIM = 1 << 18
LARGEST_RANK = 5
# of a tensor on the Neural Engine; of the last dimension of its states
NE_DIM = 1 << 14
NE_MULTIPLE = 32
UNKNOWN_TO_DEVICES = ("int64", "uint64", "fp64")  # Core ML narrows them without a word


@dataclass(frozen=True)
class Finding:
    """One fault: ``rule`` is the name of its check, ``where`` an operation or a function."""

    rule: str
    where: str
    what: str


Check = Callable[[Package], Iterator[Finding]]


def lint(package: Package, neural_engine: bool = False) -> list[Finding]:
    """Every fault that the checks find, in their order. A check that cannot go on is a finding of its own.

    ``neural_engine``: also what is no fault elsewhere.
    """
    found: list[Finding] = []
    for name, check in (CHECKS | ({"on_neural_engine": on_neural_engine} if neural_engine else {})).items():
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
    """The constants that an operation holds itself."""
    yield from operation.attributes.items()
    yield from (
        (name, argument)
        for name, arguments in operation.inputs.items()
        for argument in arguments
        if isinstance(argument, Value)
    )


def operations(package: Package) -> Iterator[Finding]:
    """Ops, attributes and types that the evaluator has: each function resolves."""
    for name in package.functions:
        try:
            Evaluator(package, name, without_weights=True)
        except H1ExportError as error:
            yield Finding("operations", error.where, error.what)


def types(package: Package) -> Iterator[Finding]:
    """No 64-bit numbers."""
    for _, operation in _operations(package):
        kinds = [kind for _, kind in operation.outputs] + [value.type for _, value in _values(operation)]
        for kind in kinds:
            if kind.dtype.name in UNKNOWN_TO_DEVICES:
                yield Finding("types", operation.where, f"has {kind}")


def constants(package: Package) -> Iterator[Finding]:
    """Blobs that lie within their file and hold what the program says, and no constant that is not finite."""
    for _, operation in _operations(package):
        for name, value in _values(operation):
            try:
                array = value.array()
            except H1ExportError as error:
                yield Finding("constants", error.where, error.what)
                continue
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                yield Finding("constants", operation.where, f"{name} holds values that are not finite")


def blocks(package: Package) -> Iterator[Finding]:
    """Scales that divide their integers along every axis."""
    for function, operation in _operations(package):
        if operation.type == "constexpr_blockwise_shift_scale":
            data, scale = (stored_values(operation, function.block)[name].type.shape for name in ("data", "scale"))
            if len(data) != len(scale) or any(
                not part or (whole or 0) % part for whole, part in zip(data, scale, strict=True)
            ):
                yield Finding("blocks", operation.where, f"has integers {list(data)} and scales {list(scale)}")


def states(package: Package) -> Iterator[Finding]:
    """The same states in every function, read and written by each: one state object serves them all."""
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
    """No tensor with a dimension of 0, one known only when run, one beyond LARGEST_DIM, or too many of them."""
    for _, operation in _operations(package):
        for name, kind in operation.outputs:
            if len(kind.shape) > LARGEST_RANK or not all(size and size <= LARGEST_DIM for size in kind.shape):
                yield Finding("dimensions", operation.where, f"output {name!r} is {kind}")


def calls(package: Package) -> Iterator[Finding]:
    """Every op computes the shape that it declares, and stays within its bounds, in a call of each function.

    Where a package says how many tokens it has room for, the call is on the last of them, and one beyond has to fail.
    """
    room = dict(package.model.description.metadata.userDefined).get(layout.MAX_CONTEXT, "")
    for name, function in package.functions.items():
        if not (room.isdigit() and {layout.POSITION, layout.INPUT_IDS} <= function.inputs.keys()):
            yield from _run(package, name, {})
            continue
        last = int(room) - int(function.inputs[layout.INPUT_IDS].shape[-1] or 1)
        yield from _run(package, name, {layout.POSITION: last})
        if not list(_run(package, name, {layout.POSITION: last + 1})):
            yield Finding("calls", f"function {name!r}", f"writes beyond its room for {room} tokens without an error")


def _run(package: Package, name: str, given: Mapping[str, int]) -> Iterator[Finding]:
    """What goes wrong in a call on ones, or on the numbers ``given`` for some inputs; no large weight is read."""
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
    """coremltools' own reader takes it, and its own validation finds nothing."""
    loader = sdk.module("coremltools.converters.mil.frontend.milproto.load")
    weights = str(package.weights) if package.weights.is_dir() else ""
    try:
        loader.load(
            package.model, specification_version=package.model.specificationVersion, file_weights_dir=weights
        ).validate()
    except Exception as error:  # it raises what its many ops raise
        yield Finding("reload", str(package.path), f"coremltools says {type(error).__name__}: {str(error)[:200]}")


def on_neural_engine(package: Package) -> Iterator[Finding]:
    """States whose last dimension it takes, no tensor too wide for it, no scales by block, which others have found silently wrong there."""
    for name, function in package.functions.items():
        for state, kind in function.states.items():
            if (kind.shape[-1] or 0) % NE_MULTIPLE:
                yield Finding(
                    "on_neural_engine",
                    f"function {name!r}",
                    f"state {state!r} is {kind}, whose last dimension is no multiple of 32",
                )
    for _, operation in _operations(package):
        if operation.type == "constexpr_blockwise_shift_scale":
            yield Finding("on_neural_engine", operation.where, "has scales by block")
        elif not operation.constant and any(
            (size or 0) > NE_DIM for _, kind in operation.outputs for size in kind.shape
        ):
            yield Finding(
                "on_neural_engine",
                operation.where,
                f"is wider than {NE_DIM}: {', '.join(str(kind) for _, kind in operation.outputs)}",
            )


def description(package: Package) -> Iterator[Finding]:
    """What the model says of its functions is what its program has."""
    said = {function.name: function for function in package.model.description.functions}
    for name in package.functions.keys() ^ said.keys():
        yield Finding("description", f"function {name!r}", "is in the program or in the description alone")
    for name in package.functions.keys() & said.keys():
        function = package.functions[name]
        pairs: Mapping[str, tuple[set[str], set[str]]] = {
            "inputs": (set(function.inputs), {feature.name for feature in said[name].input}),
            "outputs": (set(function.outputs), {feature.name for feature in said[name].output}),
            "states": (set(function.states), {feature.name for feature in said[name].state}),
        }
        for what, (own, described) in pairs.items():
            if own != described:
                yield Finding(
                    "description", f"function {name!r}", f"{what} {sorted(own ^ described)} are on one side only"
                )


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (operations, types, constants, blocks, states, dimensions, description, calls, reload)
}
