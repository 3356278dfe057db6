"""A graph names files of its artifact only, wherever in it a tensor is stored, and bytes inside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import GraphProto, ModelProto, TensorProto, helper

from h1export.errors import H1ExportError
from h1export.targets.onnx.graph_file import MOST_NESTED, read_graph

FILES = {"model.onnx.data": ("", 64), "sub/other.data": ("", 8)}


def outside(location: str, offset: str = "0", length: str = "16") -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=value)
    return tensor


def graph_of(*nodes: onnx.NodeProto) -> GraphProto:
    return helper.make_graph(nodes, "g", [], [])


def with_attribute(tensor: TensorProto, depth: int = 0) -> GraphProto:
    graph = graph_of(helper.make_node("Constant", [], ["c"], value=tensor))
    for _ in range(depth):
        graph = graph_of(helper.make_node("If", ["c"], ["d"], then_branch=graph, else_branch=graph))
    return graph


def initializer(tensor: TensorProto) -> ModelProto:
    graph = graph_of()
    graph.initializer.append(tensor)
    return helper.make_model(graph)


def sparse(tensor: TensorProto, indices: bool) -> ModelProto:
    graph = graph_of()
    found = graph.sparse_initializer.add()
    (found.indices if indices else found.values).CopyFrom(tensor)
    return helper.make_model(graph)


def sparse_attribute(tensor: TensorProto) -> ModelProto:
    node = helper.make_node("Constant", [], ["c"])
    attribute = node.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.values.CopyFrom(tensor)
    return helper.make_model(graph_of(node))


def in_list(tensor: TensorProto) -> ModelProto:
    node = helper.make_node("Planted", [], ["c"])
    node.attribute.add(name="values", type=onnx.AttributeProto.TENSORS).tensors.append(tensor)
    return helper.make_model(graph_of(node))


def mistyped(tensor: TensorProto) -> ModelProto:
    node = helper.make_node("Planted", [], ["c"])
    node.attribute.add(name="value", type=onnx.AttributeProto.INT).t.CopyFrom(tensor)
    return helper.make_model(graph_of(node))


def in_function(tensor: TensorProto) -> ModelProto:
    model = helper.make_model(graph_of())
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    model.functions.append(helper.make_function("x", "f", [], ["c"], [node], [helper.make_opsetid("", 21)]))
    return model


def default_of_function(tensor: TensorProto) -> ModelProto:
    model = in_function(helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0]))
    model.functions[0].attribute_proto.append(helper.make_attribute("a", tensor))
    return model


def in_training(tensor: TensorProto) -> ModelProto:
    model = helper.make_model(graph_of())
    model.training_info.add().algorithm.initializer.append(tensor)
    return model


def unmarked(tensor: TensorProto) -> ModelProto:
    tensor.data_location = TensorProto.DEFAULT
    return initializer(tensor)


PLACES: dict[str, Callable[[TensorProto], ModelProto]] = {
    "initializer": initializer,
    "unmarked": unmarked,
    "sparse values": lambda tensor: sparse(tensor, False),
    "sparse indices": lambda tensor: sparse(tensor, True),
    "attribute": lambda tensor: helper.make_model(with_attribute(tensor)),
    "branch": lambda tensor: helper.make_model(with_attribute(tensor, 1)),
    "branch of a branch": lambda tensor: helper.make_model(with_attribute(tensor, 3)),
    "sparse attribute": sparse_attribute,
    "list": in_list,
    "mistyped attribute": mistyped,
    "function": in_function,
    "default of a function": default_of_function,
    "training": in_training,
}
LOCATIONS = (
    "",
    "../model.onnx.data",
    "../../../etc/passwd",
    "/etc/passwd",
    "./model.onnx.data",
    "sub/../model.onnx.data",
    "model.onnx.data/",
    "MODEL.ONNX.DATA",
    "unlisted.data",
    "*/_ORT_MEM_ADDR_/*",
    "a\0b",
    "\x1b[2J" * 5000,
)


@pytest.fixture
def read(tmp_path: Path) -> Iterator[Callable[[ModelProto], None]]:
    def read(model: ModelProto) -> None:
        (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
        read_graph(tmp_path / "model.onnx", FILES)

    return read


@pytest.mark.parametrize("place", PLACES)
def test_every_tensor_is_looked_at(place: str, read: Callable[[ModelProto], None]) -> None:
    read(PLACES[place](outside("model.onnx.data")))
    read(PLACES[place](outside("sub/other.data", length="8")))
    for location in LOCATIONS:
        with pytest.raises(H1ExportError, match="which is no file of the artifact") as caught:
            read(PLACES[place](outside(location)))
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) <= 300 + len(str(caught.value.where))


@pytest.mark.parametrize(
    ("offset", "length"),
    [("49", "16"), ("65", "0"), ("-1", "4"), ("x", "4"), ("0", "-4"), ("0", str(1 << 62)), ("9" * 40, "0"), ("٣", "1")],
)
def test_bytes_are_inside_their_file(offset: str, length: str, read: Callable[[ModelProto], None]) -> None:
    read(initializer(outside("model.onnx.data", "48", "16")))
    with pytest.raises(H1ExportError, match=r"is not inside 'model\.onnx\.data'"):
        read(initializer(outside("model.onnx.data", offset, length)))


def test_graphs_within_graphs_have_an_end(read: Callable[[ModelProto], None]) -> None:
    tensor = outside("model.onnx.data")
    node = helper.make_node("If", ["c"], ["d"], then_branch=with_attribute(tensor))
    for _ in range(MOST_NESTED):
        node = helper.make_node("If", ["c"], ["d"], then_branch=graph_of(node))
    with pytest.raises(H1ExportError, match="levels deep"):
        read(helper.make_model(graph_of(node)))


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.binary(max_size=300))
def test_other_bytes_are_a_model_or_one_line(data: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(data)
        said = ""
        try:
            read_graph(path, FILES)
        except H1ExportError as error:
            said = str(error)
        assert len(said) <= 300 + len(str(path))


MARKED = "QZ_MARK"  # as long as a text without UTF-8 that takes its place


def every_text() -> dict[str, ModelProto]:
    """Return models with the mark in one of the texts that a graph has."""
    model = initializer(outside("model.onnx.data"))
    named = {name: ModelProto.FromString(model.SerializeToString()) for name in ("producer", "opset", "metadata")}
    named["producer"].producer_name = MARKED
    named["opset"].opset_import.add(domain=MARKED, version=1)
    named["metadata"].metadata_props.add(key=MARKED, value="x")
    for part in ("name", "op_type", "domain", "input", "output", "attribute"):
        node = helper.make_node("Relu", ["x"], ["y"], name="n")
        if part in ("input", "output"):
            getattr(node, part).append(MARKED)
        elif part == "attribute":
            node.attribute.add(name=MARKED, type=onnx.AttributeProto.INT, i=1)
        else:
            setattr(node, part, MARKED)
        named[part] = helper.make_model(graph_of(node))
    for part in ("key", "value", "location", "tensor"):
        tensor = outside(MARKED if part == "location" else "model.onnx.data")
        if part == "tensor":
            tensor.name = MARKED
        elif part != "location":
            tensor.external_data.add(key=MARKED if part == "key" else "k", value=MARKED if part == "value" else "v")
        named[part] = initializer(tensor)
    return named


@pytest.mark.parametrize("name", every_text())
def test_a_text_that_is_not_utf8(name: str, tmp_path: Path) -> None:
    content = every_text()[name].SerializeToString()
    assert content.count(MARKED.encode()) == 1
    (tmp_path / "model.onnx").write_bytes(content.replace(MARKED.encode(), b"\xff\xfe_MARK"))
    with pytest.raises(H1ExportError, match="has a text that is not UTF-8"):
        read_graph(tmp_path / "model.onnx", FILES)
