"""Packages: the function that runs, the constants that are stored, and the errors of damaged packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreml_damage import DATA, Damage, change_manifest, change_model, write
from coremltools.libmilstoragepython import _BlobStorageWriter

from h1export.errors import H1ExportError
from h1export.targets.coreml.evaluator import Evaluator, Package
from h1export.targets.coreml.evaluator.constants import constant_array

ONE = ("fp32", (2,))


def doubling(mil: Any, factor: float = 2) -> Any:
    return mil.function({"x": ONE}, [mil.op("mul", {"x": "x", "y": mil.value(float(factor))}, {"y": ONE})], ["y"])


@pytest.fixture
def package(mil: Any) -> Path:
    """A package with a function ``main`` that doubles its input."""
    return mil.save({"main": doubling(mil)})


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
        r"Manifest.json: is not JSON \(not JSON at line",
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
    """A package with two functions that add the same fp16 blob under different names."""
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
    branch = mil.op("cond", {"pred": "p"}, {"y": ONE}, blocks=branches)
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
