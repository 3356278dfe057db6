"""Packages: which function runs, what is stored in them, and what is wrong with those that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coremltools.libmilstoragepython import _BlobStorageWriter
from coremltools.proto import MIL_pb2, Model_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.errors import H1ExportError
from h1export.targets.coreml.evaluator import Evaluator, Package
from h1export.targets.coreml.evaluator.constants import constant_array

DATA = "Data/com.apple.CoreML"
PROPERTY = settings(deadline=None, max_examples=150, derandomize=True)
ONE = ("fp32", (2,))
Damage = Callable[[Path], object]


def doubling(mil: Any, factor: float = 2) -> Any:
    return mil.function({"x": ONE}, [mil.op("mul", {"x": "x", "y": mil.value(float(factor))}, {"y": ONE})], ["y"])


@pytest.fixture
def package(mil: Any) -> Path:
    """A function ``main`` that doubles."""
    return mil.save({"main": doubling(mil)})


def change_manifest(edit: Callable[[Any], object]) -> Damage:
    def damage(path: Path) -> None:
        manifest = json.loads((path / "Manifest.json").read_text())
        edit(manifest)
        (path / "Manifest.json").write_text(json.dumps(manifest))

    return damage


def write(file: str, content: bytes) -> Damage:
    return lambda path: (path / file).write_bytes(content)


def change_model(edit: Callable[[Any], object]) -> Damage:
    def damage(path: Path) -> None:
        file = path / DATA / "model.mlmodel"
        model = Model_pb2.Model.FromString(file.read_bytes())
        edit(model)
        file.write_bytes(model.SerializeToString())

    return damage


def point_to(entry: object) -> Damage:
    return change_manifest(lambda manifest: manifest["itemInfoEntries"]["ROOT"].update(path=entry))


def move_out_and_link(path: Path) -> None:
    outside = path.with_suffix(".model")
    (path / DATA / "model.mlmodel").rename(outside)
    (path / DATA / "model.mlmodel").symlink_to(outside)


def link_to_itself(path: Path) -> None:
    (path / DATA / "model.mlmodel").unlink()
    (path / DATA / "model.mlmodel").symlink_to("model.mlmodel")


def neural_network(model: Any) -> None:
    model.neuralNetwork.SetInParent()


def other_opset(model: Any) -> None:
    model.mlProgram.functions["main"].opset = "CoreML7"


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no manifest": (lambda path: (path / "Manifest.json").unlink(), r"Manifest.json: cannot be read \(No such file"),
    "a folder as manifest": (
        lambda path: (path / "Manifest.json").unlink() or (path / "Manifest.json").mkdir(),
        "Manifest.json: cannot be",
    ),
    "half a manifest": (
        write("Manifest.json", b'{"itemInfoEntries":'),
        r"Manifest.json: is not JSON \(JSONDecodeError\)",
    ),
    "not text": (write("Manifest.json", b"\xff\xfe\x00"), "Manifest.json: is not JSON"),
    "deep nesting": (write("Manifest.json", b"[" * 200_000), "Manifest.json: is not JSON"),
    "a list": (write("Manifest.json", b"[]"), "Manifest.json: names no root model"),
    "no root": (
        change_manifest(lambda manifest: manifest.pop("rootModelIdentifier")),
        "names no root model.*rootModelIdentifier",
    ),
    "another root": (change_manifest(lambda manifest: manifest.update(rootModelIdentifier="X")), "names no root model"),
    "a root that is a list": (
        change_manifest(lambda manifest: manifest.update(rootModelIdentifier=[])),
        "names no root model",
    ),
    "a path that is a number": (point_to(5), "has 5 as the root model's path"),
    "a path upwards": (
        point_to("../../elsewhere.mlmodel"),
        "Manifest.json: refers to .*elsewhere.mlmodel', outside the package",
    ),
    "an absolute path": (point_to("/etc/hostname"), "refers to '/etc/hostname', outside the package"),
    "a path with a zero byte": (point_to("a\0b"), "refers to .*outside the package"),
    "a path of many letters": (point_to("x" * 5000), "refers to .*(outside the package|missing)"),
    "a path to a folder": (point_to("com.apple.CoreML"), "refers to .*which is missing"),
    "a path to nothing": (point_to("com.apple.CoreML/other.mlmodel"), "refers to .*other.mlmodel', which is missing"),
    "a link that leads out": (move_out_and_link, "refers to .*model.mlmodel', outside the package"),
    "a link to itself": (link_to_itself, "refers to .*model.mlmodel', (outside the package|which is missing)"),
    "no model": (lambda path: (path / DATA / "model.mlmodel").unlink(), "refers to .*model.mlmodel', which is missing"),
    "an empty model": (write(f"{DATA}/model.mlmodel", b""), "holds no model, not an mlProgram; build it for iOS 18"),
    "garbage": (write(f"{DATA}/model.mlmodel", b"\xff" * 100), r"model.mlmodel: is not a Core ML model \("),
    "a neural network": (change_model(neural_network), "holds a model of type neuralNetwork, not an mlProgram"),
    "an old specification": (
        change_model(lambda model: setattr(model, "specificationVersion", 8)),
        "has specification version 8, not 9",
    ),
    "no function": (change_model(lambda model: model.mlProgram.functions.clear()), "has no function; build it"),
    "another opset": (change_model(other_opset), "function 'main': is written for CoreML7, not CoreML8"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_no_package_is_refused(package: Path, damage: str) -> None:
    assert Package.open(package).functions.keys() == {"main"}
    change, what = DAMAGES[damage]
    change(package)
    with pytest.raises(H1ExportError, match=what) as caught:
        Package.open(package)
    assert str(caught.value).startswith(str(package))
    assert "\n" not in str(caught.value)


def test_a_missing_package_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for name in ("file", "missing"):
        with pytest.raises(
            H1ExportError, match=r"Manifest\.json: cannot be read .*; give the folder of an \.mlpackage"
        ):
            Package.open(tmp_path / name)


def test_a_link_to_a_package_is_followed(package: Path, tmp_path: Path) -> None:
    (tmp_path / "link.mlpackage").symlink_to(package)
    assert Evaluator(Package.open(tmp_path / "link.mlpackage")).run({"x": np.ones(2, np.float32)})["y"].tolist() == [
        2,
        2,
    ]


def test_the_function_that_runs(mil: Any) -> None:
    path = mil.save({"b": doubling(mil), "a": doubling(mil, 3)})
    x = {"x": np.ones(2, np.float32)}
    assert Evaluator(Package.open(path)).run(x)["y"].tolist() == [3, 3]
    assert Evaluator(Package.open(path), "b").run(x)["y"].tolist() == [2, 2]
    change_model(lambda model: setattr(model.description, "defaultFunctionName", "b"))(path)
    assert Package.open(path).default_function == "b"
    assert Evaluator(Package.open(path)).run(x)["y"].tolist() == [2, 2]
    assert Package.open(mil.save({"a": doubling(mil), "main": doubling(mil)})).default_function == "main"
    with pytest.raises(H1ExportError, match="has no function 'c'; choose from a, b"):
        Evaluator(Package.open(path), "c")


@pytest.fixture
def stored(mil: Any, tmp_path: Path) -> Path:
    """Two functions that add the same fp16 blob, which one of them has under another name."""
    writer = _BlobStorageWriter(str(tmp_path / "weight.bin"))
    offset = writer.write_fp16_data(np.arange(4, dtype=np.float16).view(np.uint16))
    del writer

    def adding(name: str) -> Any:
        operations = [
            mil.const(name, mil.blob(offset, ("fp16", (4,)))),
            mil.const("unused", mil.value([1, 2])),
            mil.op("add", {"x": "x", "y": name}, {"y": ("fp16", (4,))}),
        ]
        return mil.function({"x": ("fp16", (4,))}, operations, ["y"])

    return mil.save({"first": adding("w"), "second": adding("v")}, (tmp_path / "weight.bin").read_bytes())


def test_blobs_are_read_and_held_once(stored: Path) -> None:
    package = Package.open(stored)
    for function in ("first", "second"):
        assert Evaluator(package, function).run({"x": np.ones(4, np.float16)})["y"].tolist() == [1, 2, 3, 4]
    first = constant_array(package, package.operation("w", "first"), {})
    second = constant_array(package, package.operation("v", "second"), {})
    assert first is second


def test_what_is_stored(stored: Path, mil: Any) -> None:
    package = Package.open(stored)
    found = package.constant("w", "first")["val"]
    assert found.dtype == np.float16
    assert found.tolist() == [0, 1, 2, 3]
    with pytest.raises(H1ExportError, match="function 'first' has no operation with an output 'v'"):
        package.operation("v", "first")
    with pytest.raises(H1ExportError, match="op add 'y': is computed at run time; request a constant"):
        package.constant("y", "first")
    codes = np.array([[1, -8, 7, 0]], np.int8)
    scale = np.array([[0.5, 2]], np.float16)
    operations = [
        mil.const("s", mil.value(scale)),
        mil.op(
            "constexpr_blockwise_shift_scale", {"data": mil.value(codes, "int4"), "scale": "s"}, {"w": ("fp16", (1, 4))}
        ),
        mil.op("constexpr_blockwise_shift_scale", {"data": "w", "scale": "s"}, {"again": ("fp16", (1, 4))}),
    ]
    package = Package.open(mil.save({"main": mil.function({}, operations, ["w"])}))
    parts = package.constant("w")
    assert parts.keys() == {"data", "scale"}
    assert np.array_equal(parts["data"], codes)
    assert np.array_equal(parts["scale"], scale)
    with pytest.raises(H1ExportError, match="takes data from 'w', which is computed"):
        package.constant("again")


def test_an_operation_of_a_nested_block_is_found(mil: Any) -> None:
    branches = [mil.block({}, [mil.op("exp" if i else "sin", {"x": "x"}, {f"b{i}": ONE})], [f"b{i}"]) for i in range(2)]
    branch = mil.op("cond", {"pred": "p"}, {"y": ONE}, branches)
    package = Package.open(mil.save({"main": mil.function({"x": ONE, "p": ("bool", ())}, [branch], ["y"])}))
    assert package.operation("b1").type == "exp"


def outside(path: Path) -> None:
    weights = path / DATA / "weights" / "weight.bin"
    weights.rename(path.with_suffix(".bin"))
    weights.symlink_to(path.with_suffix(".bin"))


def refer_to(file: str) -> Damage:
    def edit(model: Any) -> None:
        block = model.mlProgram.functions["first"].block_specializations["CoreML8"]
        block.operations[0].attributes["val"].blobFileValue.fileName = file

    return change_model(edit)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (outside, "op const 'w': refers to .*weight.bin', outside the package"),
        (
            lambda path: (path / DATA / "weights" / "weight.bin").unlink(),
            "op const 'w': refers to .*weight.bin', which is missing",
        ),
        (refer_to("@model_path/../../../weight.bin"), "op const 'w': refers to .*weight.bin', outside the package"),
        (refer_to("/etc/hostname"), "op const 'w': refers to the file '/etc/hostname', not below @model_path/"),
        (refer_to("@model_path/a\0b"), "op const 'w': refers to .*, outside the package"),
        (refer_to("@model_path/weights"), "op const 'w': refers to .*weights', which is missing"),
        (write(f"{DATA}/weights/weight.bin", b""), "weight.bin: has 0 bytes, less than its header of 64"),
    ],
)
def test_weights_that_are_not_the_packages_are_refused(stored: Path, damage: Damage, what: str) -> None:
    damage(stored)
    with pytest.raises(H1ExportError, match=what):
        Evaluator(Package.open(stored), "first")


def of_type(model: Any, number: int) -> None:
    model.mlProgram.functions["main"].inputs[0].type.tensorType.dataType = number


def first_constant(change: Callable[[Any], object]) -> Damage:
    """Change the constant of the first operation."""

    def edit(model: Any) -> None:
        change(
            model.mlProgram.functions["main"]
            .block_specializations["CoreML8"]
            .operations[0]
            .inputs["y"]
            .arguments[0]
            .value
        )

    return change_model(edit)


def first_operation(change: Callable[[Any], object]) -> Damage:
    return change_model(
        lambda model: change(model.mlProgram.functions["main"].block_specializations["CoreML8"].operations[0])
    )


def of_list(value: Any) -> None:
    value.type.listType.type.tensorType.dataType = MIL_pb2.FLOAT32


def of_integers(value: Any) -> None:
    value.immediateValue.tensor.ints.values.append(1)


def of_bytes(value: Any) -> None:
    value.immediateValue.tensor.bytes.values = b"\0" * 3


def of_unknown_shape(value: Any) -> None:
    value.type.tensorType.dimensions.add().unknown.variadic = False


def without_rank(value: Any) -> None:
    value.type.tensorType.dimensions.add().unknown.variadic = True


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (change_model(lambda model: of_type(model, 99)), "input 'x': has elements of MIL type 99"),
        (
            change_model(
                lambda model: (
                    model.mlProgram.functions["main"].inputs.add().CopyFrom(model.mlProgram.functions["main"].inputs[0])
                )
            ),
            "twice",
        ),
        (
            first_operation(lambda op: setattr(op, "type", "sing")),
            "op sing 'y': is an op that the evaluator does not have; it has .*mul",
        ),
        (
            first_operation(lambda op: op.inputs["z"].CopyFrom(op.inputs["y"])),
            "op mul 'y': has inputs that the evaluator does not know: z",
        ),
        (first_operation(lambda op: op.inputs.pop("y")), "op mul 'y': lacks y"),
        (first_operation(lambda op: op.inputs["y"].arguments.add(name="x")), "op mul 'y': has 2 values for y"),
        (
            first_operation(lambda op: op.inputs["y"].ClearField("arguments")),
            "op mul 'y': has an input 'y' without a value",
        ),
        (
            first_operation(lambda op: op.inputs["y"].arguments[0].ClearField("binding")),
            "op mul 'y': has an input without a value",
        ),
        (
            first_operation(lambda op: setattr(op.inputs["x"].arguments[0], "name", "w")),
            "takes 'w', which no earlier operation computes",
        ),
        (
            first_operation(lambda op: setattr(op.outputs[0], "name", "w")),
            "function 'main': returns 'y', which no operation computes",
        ),
        (first_operation(lambda op: op.outputs[0].type.ClearField("type")), "op mul 'y': is of no type, not a tensor"),
        (first_operation(lambda op: setattr(op, "type", "const")), "op const 'y': is a const without a value"),
        (first_constant(of_list), "op mul 'y': is of listType, not a tensor"),
        (first_constant(of_integers), "op mul 'y': holds ints for elements of fp32"),
        (first_constant(of_bytes), "op mul 'y': holds 3 bytes for 1 elements of fp32"),
        (first_constant(lambda value: value.ClearField("value")), "holds a constant that is not a tensor"),
        (
            first_constant(lambda value: value.immediateValue.tensor.floats.values.append(1)),
            "holds 2 values for 1 elements of fp32",
        ),
        (first_constant(of_unknown_shape), r"holds a constant of unknown shape fp32\[\?\]"),
        (first_constant(without_rank), "has no fixed rank"),
    ],
)
def test_a_damaged_program_is_refused(package: Path, damage: Damage, what: str) -> None:
    damage(package)
    with pytest.raises(H1ExportError, match=what) as caught:
        Evaluator(Package.open(package))
    assert "\n" not in str(caught.value)


def test_a_constant_is_of_the_type_that_its_output_declares(mil: Any) -> None:
    const = mil.const("w", mil.value([1.0, 2.0]))
    const.outputs[0].type.CopyFrom(mil.type(("fp32", (3,))))
    package = Package.open(mil.save({"main": mil.function({}, [const], ["w"])}))
    with pytest.raises(H1ExportError, match=r"op const 'w': holds fp32\[2\], and is declared as fp32\[3\]"):
        Evaluator(package)


@PROPERTY
@given(st.data())
def test_no_damage_ends_in_a_traceback(mil: Any, data: st.DataObject) -> None:
    """Any change of the program's bytes: it runs all the same, or it is refused."""
    operations = [
        mil.const("w", mil.value(np.ones((2, 3), np.float16))),
        mil.op("linear", {"x": "x", "weight": "w"}, {"l": ("fp16", (1, 2))}),
        mil.op("concat", {"values": ["l", "l"], "axis": mil.value(1)}, {"c": ("fp16", (1, 4))}),
        mil.op("read_state", {"input": "s"}, {"r": ("fp16", (1, 4))}),
        mil.op("add", {"x": "c", "y": "r"}, {"y": ("fp16", (1, 4))}),
        mil.op("write_state", {"input": "s", "data": "y"}, {}),
    ]
    path = mil.save({"main": mil.function({"x": ("fp16", (1, 3))}, operations, ["y"], {"s": ("fp16", (1, 4))})})
    file = path / DATA / "model.mlmodel"
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    with suppress(H1ExportError):
        evaluator = Evaluator(Package.open(path))
        evaluator.run({"x": np.ones((1, 3), np.float16)}, evaluator.initial_states())
