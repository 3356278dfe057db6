"""A saved .mlpackage: its manifest, its program and its weights.

It is read from the file formats alone; the converter of coremltools is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

from h1export import forms
from h1export.errors import H1ExportError
from h1export.model.config_reader import shown
from h1export.targets.coreml import sdk
from h1export.targets.coreml.evaluator.blob import COPY_AGAIN, BlobFile
from h1export.targets.coreml.evaluator.dtypes import Array, DType
from h1export.targets.coreml.evaluator.parse import parse_function
from h1export.targets.coreml.evaluator.program import BlobReference, Block, Function, Operation, Value

MANIFEST = "Manifest.json"
DATA = "Data"  # the folder that the manifest's paths start from
MODEL_PATH = "@model_path/"  # how a program writes the folder of its own file
SPECIFICATION = 9
OPSET = "CoreML8"
MOST_MODEL = 256 << 20  # bytes of a model without its weights
REBUILD = "build it for iOS 18 as an mlProgram"


class Package:
    """A read-only view of a package, which ``open`` creates.

    ``functions`` has the parsed functions by name; ``model`` is the Model message, for what they leave out.
    """

    def __init__(self, path: Path, file: Path, model: Any) -> None:
        self.path = path
        self.model = model
        self._file = file
        self._blobs: dict[str, BlobFile] = {}
        self._cache: dict[Hashable, Array] = {}
        functions = {str(name): function for name, function in model.mlProgram.functions.items()}
        self.functions: Mapping[str, Function] = {
            name: parse_function(name, functions[name], OPSET, read=self._read, where=str(path))
            for name in sorted(functions)
        }

    @classmethod
    def open(cls, path: str | Path) -> Package:
        """Read the manifest and the program; weights are mapped when they are first read.

        Raises:
            H1ExportError: ``path`` is not a package, is damaged, refers to files outside itself or is not an iOS 18
                mlProgram; or coremltools is not installed.
        """
        path = Path(path)
        file = model_file(path)
        proto = sdk.proto()
        model = proto.Model_pb2.Model()
        try:
            model.ParseFromString(forms.content(file, COPY_AGAIN, MOST_MODEL))
        except proto.DecodeError as error:
            raise H1ExportError(file, f"is not a Core ML model ({error})", COPY_AGAIN) from error
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
        """The folder that has the weight files."""
        return self._file.parent / "weights"

    @property
    def default_function(self) -> str:
        """The function to run if none is named: the model's own choice, else ``main``, else the first by name."""
        model_default = str(self.model.description.defaultFunctionName)
        return next((name for name in (model_default, "main") if name in self.functions), next(iter(self.functions)))

    def function(self, name: str) -> Function:
        """Return the function ``name``.

        Raises:
            H1ExportError: the package has no such function.
        """
        if name not in self.functions:
            raise H1ExportError(self.path, f"has no function {name!r}", f"choose from {', '.join(self.functions)}")
        return self.functions[name]

    def operation(self, output: str, function: str | None = None) -> Operation:
        """Return the operation with this output; nested blocks are searched too.

        Raises:
            H1ExportError: the function does not exist or no operation has this output.
        """
        name = function or self.default_function
        operations = self.function(name).block.walk()
        found = next((op for op in operations if output in dict(op.outputs)), None)
        if found is None:
            raise H1ExportError(
                self.path, f"function {name!r} has no operation with an output {output!r}", "list its operations"
            )
        return found

    def constant(self, output: str, function: str | None = None) -> dict[str, Array]:
        """Return the arrays that are stored for a constant, in their stored types.

        A const has ``val``; a constexpr op has its inputs by name, for example ``constexpr_blockwise_shift_scale`` has
        ``data`` (int4 as int8), ``scale`` and perhaps ``offset``.

        Raises:
            H1ExportError: no operation has this output, it is computed at run time, or a reference is broken.
        """
        block = self.function(function or self.default_function).block
        operation = self.operation(output, function)
        return {name: value.array() for name, value in stored_values(operation, block).items()}

    def blob(self, file: str, where: str) -> BlobFile:
        """Return the weights file ``file``, by its name in the program; ``where`` is for error messages.

        Raises:
            H1ExportError: the file is outside the package, missing or damaged.
        """
        if file not in self._blobs:
            if not file.startswith(MODEL_PATH):
                raise H1ExportError(where, f"refers to the file {file!r}, not below {MODEL_PATH}", COPY_AGAIN)
            path = _inside(self.path, self._file.parent / file.removeprefix(MODEL_PATH), where)
            self._blobs[file] = BlobFile(path)
        return self._blobs[file]

    def cached(self, key: Hashable, make: Callable[[], Array]) -> Array:
        """Return the array that ``make`` returned on its first call for ``key``.

        All functions and evaluators of the package share it.
        """
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def _read(self, reference: BlobReference, dtype: DType, count: int, *, where: str) -> Array:
        return self.blob(reference.file, where).read(reference.offset, dtype, count)


def stored_values(operation: Operation, block: Block) -> dict[str, Value]:
    """Return the stored values of a const or constexpr operation by the names of its inputs.

    An input that names a const of ``block`` has the value of that const.

    Raises:
        H1ExportError: the operation is computed at run time, or takes the result of another constexpr operation.
    """
    if not operation.constant:
        raise H1ExportError(operation.where, "is computed at run time", "request a constant")
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
                operation.where, f"takes {name} from {argument!r}, which is computed", "request the inputs of that one"
            )
    return values


def model_file(path: Path) -> Path:
    """Return the model file that the manifest of the package at ``path`` names.

    Raises:
        H1ExportError: the manifest cannot be read, or names no file inside the package.
    """
    file = path / MANIFEST
    try:
        manifest = forms.from_json(forms.content(file, "give the folder of an .mlpackage"))
    except forms.FormError as error:
        raise H1ExportError(file, f"is not JSON ({error})", COPY_AGAIN) from None
    try:  # other programs write further keys
        entry = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except (KeyError, TypeError, IndexError) as error:
        raise H1ExportError(file, f"names no root model ({type(error).__name__}: {error})", COPY_AGAIN) from error
    if not isinstance(entry, str):
        raise H1ExportError(file, f"has {shown(entry)} as the root model's path", COPY_AGAIN)
    return _inside(path, path / DATA / entry, file)


def _inside(folder: Path, path: Path, where: object) -> Path:
    """Return ``path``, or raise H1ExportError unless it is a file inside ``folder``."""
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
        exists = inside and path.is_file()
    except (OSError, ValueError, RuntimeError):  # a null byte, a name too long, a loop of links
        inside = exists = False
    if not inside:
        raise H1ExportError(where, f"refers to {str(path)!r}, outside the package", COPY_AGAIN)
    if not exists:
        raise H1ExportError(where, f"refers to {str(path)!r}, which is missing", COPY_AGAIN)
    return path
