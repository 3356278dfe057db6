"""The graph of an artifact as it is in its file; a runtime reads it once it names files of the artifact only.

Source: ``TensorProto.external_data`` of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from h1export import forms
from h1export.errors import H1ExportError
from h1export.model.config_reader import shown
from h1export.targets.onnx import graph_messages

AGAIN = "build the artifact again"
MOST_BYTES = 256 << 20  # of a graph without its weights; that of the largest published model has a few MB
MOST_NESTED = 16  # graphs within graphs

Files = Mapping[str, tuple[str, int]]  # of the manifest: name -> (sha256, bytes)


def read_graph(path: Path, files: Files, inside: str = "") -> Any:
    """Return the model at ``path`` without its external data, as a ModelProto of graph_messages.py.

    ``inside`` is the folder of the artifact that the graph and its data are in, with a slash; empty: its own.

    Raises:
        H1ExportError: the file cannot be read, is too large or no model, or has data outside ``files``.
    """
    return _read(path, files, inside)[1]


def checked_bytes(path: Path, files: Files) -> bytes:
    """Return the bytes of the model at ``path``, which ``read_graph`` takes.

    Raises:
        H1ExportError: As ``read_graph`` raises it.
    """
    return _read(path, files, "")[0]


def _read(path: Path, files: Files, inside: str) -> tuple[bytes, Any]:
    content = forms.content(path, AGAIN, MOST_BYTES)
    try:
        model = graph_messages.parse(content)
    except DecodeError:
        raise H1ExportError(path, "is no ONNX graph, or has a text that is not UTF-8", AGAIN) from None
    for tensor in _tensors_of(model):
        if tensor.data_location == graph_messages.EXTERNAL or tensor.external_data:
            _check(tensor, path, files, inside=inside)
    return content, model


def _check(tensor: Any, path: Path, files: Files, *, inside: str) -> None:
    places = {entry.key: entry.value for entry in tensor.external_data}
    location = places.get("location", "")
    name = inside + location
    if name not in files:
        raise H1ExportError(path, f"points to {shown(location)}, which is no file of the artifact", AGAIN)
    sizes = [places.get(key, "0") for key in ("offset", "length")]
    fits = all(text.isascii() and text.isdigit() and len(text) < 20 for text in sizes)
    if not fits or sum(map(int, sizes)) > files[name][1]:
        raise H1ExportError(path, f"has a tensor that is not inside {shown(location)}", AGAIN)


def _tensors_of(model: Any) -> Iterator[Any]:
    yield from _tensors(model.graph, 0)
    for training in model.training_info:
        for graph in (training.initialization, training.algorithm):
            yield from _tensors(graph, 0)
    for function in model.functions:
        yield from _attributes(function.node, 0)
        for attribute in function.attribute_proto:
            yield from _values(attribute, 0)


def _tensors(graph: Any, depth: int) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _attributes(graph.node, depth)


def _attributes(nodes: Any, depth: int) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            yield from _values(attribute, depth)


def _values(attribute: Any, depth: int) -> Iterator[Any]:
    """Yield the tensors of an attribute, whatever it says its type is; deeper graphs than any of ours are not read."""
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
    for item in (*sparse, *attribute.sparse_tensors):
        yield from (item.values, item.indices)
    graphs = [attribute.g] if attribute.HasField("g") else []
    for graph in (*graphs, *attribute.graphs):
        if depth == MOST_NESTED:
            raise H1ExportError("graph", f"has graphs {depth} levels deep", AGAIN)
        yield from _tensors(graph, depth + 1)
