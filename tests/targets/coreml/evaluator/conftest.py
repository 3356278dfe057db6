"""Packages written message by message, so that a test states what is in the file and takes a millisecond."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coremltools.proto import MIL_pb2, Model_pb2

from h1export.targets.coreml.evaluator import Evaluator, Package
from h1export.targets.coreml.evaluator.dtypes import BY_NAME

NAMES = {"bool": "bool", "object": "string", "float16": "fp16", "float32": "fp32"}
FIELDS = {"fp32": "floats", "bool": "bools", "string": "strings", "int32": "ints", "int16": "ints", "uint16": "ints"}
Type = tuple[str, Sequence[int | None]]  # ("fp16", (1, 2, None))


def packed(codes: np.ndarray, bits: int) -> bytes:
    """Pack integers narrower than a byte, in two's complement, with the first one in the lowest bits."""
    number = sum((int(code) % (1 << bits)) << (i * bits) for i, code in enumerate(codes.ravel()))
    return number.to_bytes((codes.size * bits + 7) // 8, "little")


class Mil:
    """Makes MIL messages, and saves packages of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = itertools.count()

    def type(self, kind: Type) -> Any:
        dtype, shape = kind
        message = MIL_pb2.ValueType()
        message.tensorType.dataType = BY_NAME[dtype].mil
        message.tensorType.rank = len(shape)
        for size in shape:
            dimension = message.tensorType.dimensions.add()
            if size is None:
                dimension.unknown.variadic = False
            else:
                dimension.constant.size = size
        return message

    def value(self, item: object, dtype: str | None = None) -> Any:
        """Make a value of an array, a scalar, a string or a list; Python floats become fp32, and integers int32."""
        array = np.asarray(item)
        if array.dtype.kind == "U":
            array = array.astype(object)
        elif not isinstance(item, (np.ndarray, np.generic)):
            array = array.astype({"f": np.float32, "i": np.int32}.get(array.dtype.kind, array.dtype))
        name = dtype or NAMES.get(str(array.dtype), str(array.dtype))
        message = MIL_pb2.Value(type=self.type((name, array.shape)))
        tensor = message.immediateValue.tensor
        if name in FIELDS:
            getattr(tensor, FIELDS[name]).values.extend(array.ravel().tolist())
        else:
            tensor.bytes.values = packed(array, BY_NAME[name].bits) if BY_NAME[name].packed else array.tobytes()
        return message

    def blob(self, offset: int, kind: Type, file: str = "@model_path/weights/weight.bin") -> Any:
        message = MIL_pb2.Value(type=self.type(kind))
        message.blobFileValue.fileName = file
        message.blobFileValue.offset = offset
        return message

    def const(self, name: str, value: Any) -> Any:
        message = MIL_pb2.Operation(type="const")
        message.attributes["val"].CopyFrom(value)
        message.outputs.add(name=name, type=value.type)
        return message

    def op(
        self, type: str, inputs: Mapping[str, object], outputs: Mapping[str, Type], *, blocks: Sequence[Any] = ()
    ) -> Any:
        """Make an operation; an input is a name, a value message, or a list of them."""
        message = MIL_pb2.Operation(type=type)
        for name, item in inputs.items():
            for part in item if isinstance(item, list) else [item]:
                argument = message.inputs[name].arguments.add()
                if isinstance(part, str):
                    argument.name = part
                else:
                    argument.value.CopyFrom(part)
        for name, kind in outputs.items():
            message.outputs.add(name=name, type=self.type(kind))
        message.blocks.extend(blocks)
        return message

    def block(self, inputs: Mapping[str, Type], operations: Sequence[Any], outputs: Sequence[str]) -> Any:
        message = MIL_pb2.Block(operations=operations, outputs=outputs)
        for name, kind in inputs.items():
            message.inputs.add(name=name, type=self.type(kind))
        return message

    def function(
        self,
        inputs: Mapping[str, Type],
        operations: Sequence[Any],
        outputs: Sequence[str],
        *,
        states: Mapping[str, Type] | None = None,
    ) -> Any:
        message = MIL_pb2.Function(opset="CoreML8")
        for name, kind in inputs.items():
            message.inputs.add(name=name, type=self.type(kind))
        for name, kind in (states or {}).items():
            state = message.inputs.add(name=name)
            state.type.stateType.wrappedType.CopyFrom(self.type(kind))
        message.block_specializations["CoreML8"].CopyFrom(self.block({}, operations, outputs))
        return message

    def save(self, functions: Mapping[str, Any], weights: bytes | None = None) -> Path:
        """Save a package with these functions, and return its path."""
        model = Model_pb2.Model(specificationVersion=9)
        model.mlProgram.version = 1
        for name, function in functions.items():
            model.mlProgram.functions[name].CopyFrom(function)
        path = self._folder / f"{next(self._count)}.mlpackage"
        data = path / "Data" / "com.apple.CoreML"
        (data / "weights").mkdir(parents=True)
        (data / "model.mlmodel").write_bytes(model.SerializeToString())
        if weights is not None:
            (data / "weights" / "weight.bin").write_bytes(weights)
        entry = {"path": "com.apple.CoreML/model.mlmodel", "name": "model.mlmodel", "author": "", "description": ""}
        manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": {"ROOT": entry}, "rootModelIdentifier": "ROOT"}
        (path / "Manifest.json").write_text(json.dumps(manifest))
        return path


@pytest.fixture(scope="session")
def mil(tmp_path_factory: pytest.TempPathFactory) -> Mil:
    return Mil(tmp_path_factory.mktemp("mil"))


def _type(array: np.ndarray) -> Type:
    return NAMES.get(str(array.dtype), str(array.dtype)), array.shape


@pytest.fixture(scope="session")
def run_op(mil: Mil) -> Iterator[Callable[..., Any]]:
    """run_op("add", {"x": array, "y": array}, {"axis": 0}, ("fp16", (2, 3))) -> the result of a program of this op.

    Tensors become the program's inputs, and a list of them a tuple; constants are stored in the op. With several output
    types, the result is a list.
    """

    def run(op: str, tensors: Mapping[str, Any], constants: Mapping[str, object], *outputs: Type) -> Any:
        given = {
            f"{name}{i}": array
            for name, item in tensors.items()
            for i, array in enumerate(item if isinstance(item, list) else [item])
        }
        inputs: dict[str, object] = {
            name: [f"{name}{i}" for i in range(len(item) if isinstance(item, list) else 1)]
            for name, item in tensors.items()
        }
        inputs |= {
            name: item if isinstance(item, MIL_pb2.Value) else mil.value(item) for name, item in constants.items()
        }
        results = {f"out{i}": kind for i, kind in enumerate(outputs)}
        operation = mil.op(op, inputs, results)
        path = mil.save(
            {"main": mil.function({name: _type(array) for name, array in given.items()}, [operation], list(results))}
        )
        found = Evaluator(Package.open(path)).run(given)
        assert all(array.dtype == BY_NAME[kind].array for array, (kind, _) in zip(found.values(), outputs, strict=True))
        return found["out0"] if len(outputs) == 1 else list(found.values())

    return run
