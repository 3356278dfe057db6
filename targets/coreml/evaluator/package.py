"""A saved .mlpackage: its manifest, its program and its weights, read without the converter."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

from h1export.errors import H1ExportError
from h1export.targets.coreml import sdk
from h1export.targets.coreml.evaluator.blob import AGAIN, BlobFile
from h1export.targets.coreml.evaluator.dtypes import Array, DType
from h1export.targets.coreml.evaluator.parse import parse_function
from h1export.targets.coreml.evaluator.program import BlobReference, Block, Function, Operation, Value

MANIFEST = "Manifest.json"
DATA = "Data"  # the folder that the manifest's paths start from
MODEL_PATH = "@model_path/"  # how a program writes the folder of its own file
SPECIFICATION = 9
OPSET = "CoreML8"
REBUILD = "build it for iOS 18 as an mlProgram"


class Package:
    """Frozen view of a package; ``open`` makes one. ``model`` is the message as parsed, for what the view leaves out."""

    def __init__(self, path: Path, file: Path, model: Any) -> None:
        self.path = path
        self.model = model
        self._file = file
        self._blobs: dict[str, BlobFile] = {}
        self._memo: dict[Hashable, Array] = {}
        functions = {str(name): function for name, function in model.mlProgram.functions.items()}
        self.functions: Mapping[str, Function] = {
            name: parse_function(name, functions[name], OPSET, read=self._read, where=str(path))
            for name in sorted(functions)
        }

    @classmethod
    def open(cls, path: str | Path) -> Package:
        """Read the manifest and the program; weights are mapped when asked for.

        Raises:
            H1ExportError: not a package, damaged, pointing outside itself, or not an iOS 18 mlProgram; coremltools not installed.
        """
        path = Path(path)
        file = _model_file(path)
        proto = sdk.proto()
        model = proto.Model_pb2.Model()
        try:
            model.ParseFromString(file.read_bytes())
        except proto.DecodeError as error:
            raise H1ExportError(file, f"is no Core ML model ({error})", AGAIN) from error
        except OSError as error:
            raise H1ExportError(file, f"cannot be read ({error.strerror})", AGAIN) from error
        if (kind := model.WhichOneof("Type")) != "mlProgram":
            raise H1ExportError(
                path, f"holds {'no model' if kind is None else f'a model of type {kind}'}, not an mlProgram", REBUILD
            )
        if model.specificationVersion != SPECIFICATION:
            raise H1ExportError(
                path, f"has specification version {model.specificationVersion}, not {SPECIFICATION}", REBUILD
            )
        if not model.mlProgram.functions:
            raise H1ExportError(path, "has no function", REBUILD)
        return cls(path, file, model)

    @property
    def weights(self) -> Path:
        """The folder that programs keep their blobs in."""
        return self._file.parent / "weights"

    @property
    def default_function(self) -> str:
        """The function that runs where none is named: the model's own choice, else ``main``, else the first by name."""
        chosen = str(self.model.description.defaultFunctionName)
        return next((name for name in (chosen, "main") if name in self.functions), next(iter(self.functions)))

    def function(self, name: str) -> Function:
        """Raises H1ExportError where there is no such function."""
        if name not in self.functions:
            raise H1ExportError(self.path, f"has no function {name!r}", f"choose from {', '.join(self.functions)}")
        return self.functions[name]

    def operation(self, output: str, function: str | None = None) -> Operation:
        """The operation with this output, in nested blocks too.

        Raises:
            H1ExportError: none has it.
        """
        name = function or self.default_function
        found = next((op for op in self.function(name).block.walk() if output in (own for own, _ in op.outputs)), None)
        if found is None:
            raise H1ExportError(
                self.path, f"function {name!r} has no operation with an output {output!r}", "look at its operations"
            )
        return found

    def constant(self, output: str, function: str | None = None) -> dict[str, Array]:
        """What is stored for a constant, as stored: ``val`` of a const; of a constexpr op all its inputs by name.

        A ``constexpr_blockwise_shift_scale`` has ``data`` (int4 as int8), ``scale`` and perhaps ``offset``.

        Raises:
            H1ExportError: no such output, or it is computed when run; a broken reference.
        """
        block = self.function(function or self.default_function).block
        operation = self.operation(output, function)
        return {name: value.array() for name, value in stored(operation, block).items()}

    def blob(self, file: str, where: str) -> BlobFile:
        """The weights file that the program calls ``file``; ``where`` asks for it.

        Raises:
            H1ExportError: it lies outside the package, is missing or damaged.
        """
        if file not in self._blobs:
            if not file.startswith(MODEL_PATH):
                raise H1ExportError(where, f"refers to the file {file!r}, not below {MODEL_PATH}", AGAIN)
            path = _inside(self.path, self._file.parent / file.removeprefix(MODEL_PATH), where)
            self._blobs[file] = BlobFile(path)
        return self._blobs[file]

    def memoised(self, key: Hashable, make: Callable[[], Array]) -> Array:
        """What ``make`` returned when first called for ``key``: one array for all functions and evaluators."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def _read(self, reference: BlobReference, dtype: DType, count: int, where: str) -> Array:
        return self.blob(reference.file, where).read(reference.offset, dtype, count)


def stored(operation: Operation, block: Block) -> dict[str, Value]:
    """Values behind a const or constexpr operation, by the name of its input, through the consts of ``block`` that it names.

    Raises:
        H1ExportError: it is computed when run, or takes the result of another constexpr operation.
    """
    if not operation.constant:
        raise H1ExportError(operation.where, "is computed when run", "ask for a constant")
    values = {name: value for name, value in operation.attributes.items() if name != "name"}
    named = any(isinstance(argument, str) for argument, *_ in operation.inputs.values())
    consts = (
        {output: other for other in block.walk() if other.type == "const" for output, _ in other.outputs}
        if named
        else {}
    )
    for name, (argument, *_) in operation.inputs.items():
        if isinstance(argument, Value):
            values[name] = argument
        elif argument in consts:
            values[name] = consts[argument].attributes["val"]
        else:
            raise H1ExportError(
                operation.where, f"takes {name} from {argument!r}, which is not stored as such", "ask for that one"
            )
    return values


def _model_file(path: Path) -> Path:
    """The model that the manifest names."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except OSError as error:
        raise H1ExportError(file, f"cannot be read ({error.strerror})", "give the folder of an .mlpackage") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise H1ExportError(file, f"is not JSON ({type(error).__name__})", AGAIN) from error
    try:
        entry = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except (KeyError, TypeError, IndexError) as error:
        raise H1ExportError(file, f"names no root model ({type(error).__name__}: {error})", AGAIN) from error
    if not isinstance(entry, str):
        raise H1ExportError(file, f"has {entry!r} as the root model's path", AGAIN)
    return _inside(path, path / DATA / entry, str(file))


def _inside(folder: Path, path: Path, where: str) -> Path:
    """``path``, which must lie in ``folder`` and be a file."""
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
        exists = inside and path.is_file()
    except (OSError, ValueError, RuntimeError):  # a null byte, a name too long, a loop of links
        inside = exists = False
    if not inside:
        raise H1ExportError(where, f"refers to {str(path)!r}, outside the package", AGAIN)
    if not exists:
        raise H1ExportError(where, f"refers to {str(path)!r}, which is missing", AGAIN)
    return path
