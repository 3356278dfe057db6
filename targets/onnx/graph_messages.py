"""The messages of an ONNX graph, as far as they have texts or tensors, without the package onnx.

Who runs an artifact needs no more of onnx than this, which is 31 MB less to install. A text that is not UTF-8 is an
error of protobuf's parser.

Source: onnx.proto of ONNX 1.22; tests/targets/onnx/test_graph_messages.py compares the table with that package.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "h1export.graph"  # protobuf keeps all messages by their names, those of onnx too
FLOAT, UINT8, INT8, INT32, INT64, FLOAT16, BFLOAT16, INT4 = 1, 2, 3, 6, 7, 10, 16, 22  # TensorProto.DataType
EXTERNAL = 1  # TensorProto.DataLocation

Field = tuple[int, str]  # number, and type: text, int64, int32, or a message; a star before it: repeated
METADATA: Mapping[str, Field] = {"metadata_props": (16, "*StringStringEntryProto")}
MESSAGES: Mapping[str, Mapping[str, Field]] = {
    "ModelProto": {
        "producer_name": (2, "text"),
        "producer_version": (3, "text"),
        "domain": (4, "text"),
        "doc_string": (6, "text"),
        "graph": (7, "GraphProto"),
        "opset_import": (8, "*OperatorSetIdProto"),
        "metadata_props": (14, "*StringStringEntryProto"),
        "training_info": (20, "*TrainingInfoProto"),
        "functions": (25, "*FunctionProto"),
        "configuration": (26, "*DeviceConfigurationProto"),
    },
    "OperatorSetIdProto": {"domain": (1, "text")},
    "GraphProto": {
        "node": (1, "*NodeProto"),
        "name": (2, "text"),
        "initializer": (5, "*TensorProto"),
        "doc_string": (10, "text"),
        "input": (11, "*ValueInfoProto"),
        "output": (12, "*ValueInfoProto"),
        "value_info": (13, "*ValueInfoProto"),
        "quantization_annotation": (14, "*TensorAnnotation"),
        "sparse_initializer": (15, "*SparseTensorProto"),
        **METADATA,
    },
    "NodeProto": {
        "input": (1, "*text"),
        "output": (2, "*text"),
        "name": (3, "text"),
        "op_type": (4, "text"),
        "attribute": (5, "*AttributeProto"),
        "doc_string": (6, "text"),
        "domain": (7, "text"),
        "overload": (8, "text"),
        "metadata_props": (9, "*StringStringEntryProto"),
        "device_configurations": (10, "*NodeDeviceConfigurationProto"),
    },
    "AttributeProto": {
        "name": (1, "text"),
        "t": (5, "TensorProto"),
        "g": (6, "GraphProto"),
        "tensors": (10, "*TensorProto"),
        "graphs": (11, "*GraphProto"),
        "doc_string": (13, "text"),
        "tp": (14, "TypeProto"),
        "type_protos": (15, "*TypeProto"),
        "ref_attr_name": (21, "text"),
        "sparse_tensor": (22, "SparseTensorProto"),
        "sparse_tensors": (23, "*SparseTensorProto"),
    },
    "TensorProto": {
        "dims": (1, "*int64"),
        "data_type": (2, "int32"),
        "name": (8, "text"),
        "doc_string": (12, "text"),
        "external_data": (13, "*StringStringEntryProto"),
        "data_location": (14, "int32"),
        **METADATA,
    },
    "StringStringEntryProto": {"key": (1, "text"), "value": (2, "text")},
    "SparseTensorProto": {"values": (1, "TensorProto"), "indices": (2, "TensorProto")},
    "TypeProto": {
        "tensor_type": (1, "TypeProto.Tensor"),
        "sequence_type": (4, "TypeProto.Sequence"),
        "map_type": (5, "TypeProto.Map"),
        "denotation": (6, "text"),
        "opaque_type": (7, "TypeProto.Opaque"),
        "sparse_tensor_type": (8, "TypeProto.SparseTensor"),
        "optional_type": (9, "TypeProto.Optional"),
    },
    "TypeProto.Tensor": {"shape": (2, "TensorShapeProto")},
    "TypeProto.SparseTensor": {"shape": (2, "TensorShapeProto")},
    "TypeProto.Sequence": {"elem_type": (1, "TypeProto")},
    "TypeProto.Optional": {"elem_type": (1, "TypeProto")},
    "TypeProto.Map": {"value_type": (2, "TypeProto")},
    "TypeProto.Opaque": {"domain": (1, "text"), "name": (2, "text")},
    "TensorShapeProto": {"dim": (1, "*TensorShapeProto.Dimension")},
    "TensorShapeProto.Dimension": {"dim_param": (2, "text"), "denotation": (3, "text")},
    "ValueInfoProto": {
        "name": (1, "text"),
        "type": (2, "TypeProto"),
        "doc_string": (3, "text"),
        "metadata_props": (4, "*StringStringEntryProto"),
    },
    "TensorAnnotation": {
        "tensor_name": (1, "text"),
        "quant_parameter_tensor_names": (2, "*StringStringEntryProto"),
    },
    "TrainingInfoProto": {
        "initialization": (1, "GraphProto"),
        "algorithm": (2, "GraphProto"),
        "initialization_binding": (3, "*StringStringEntryProto"),
        "update_binding": (4, "*StringStringEntryProto"),
    },
    "FunctionProto": {
        "name": (1, "text"),
        "input": (4, "*text"),
        "output": (5, "*text"),
        "attribute": (6, "*text"),
        "node": (7, "*NodeProto"),
        "doc_string": (8, "text"),
        "opset_import": (9, "*OperatorSetIdProto"),
        "domain": (10, "text"),
        "attribute_proto": (11, "*AttributeProto"),
        "value_info": (12, "*ValueInfoProto"),
        "overload": (13, "text"),
        "metadata_props": (14, "*StringStringEntryProto"),
    },
    "DeviceConfigurationProto": {"name": (1, "text"), "device": (3, "*text")},
    "NodeDeviceConfigurationProto": {"configuration_id": (1, "text"), "sharding_spec": (2, "*ShardingSpecProto")},
    "ShardingSpecProto": {"tensor_name": (1, "text"), "sharded_dim": (4, "*ShardedDimProto")},
    "ShardedDimProto": {"simple_sharding": (2, "*SimpleShardedDimProto")},
    "SimpleShardedDimProto": {"dim_param": (2, "text")},
}


def parse(content: bytes) -> Any:
    """Return the ModelProto of a file's bytes; fields that MESSAGES lacks are kept unread.

    Raises:
        google.protobuf.message.DecodeError: It is none, or has a text that is not UTF-8.
    """
    return _model().FromString(content)


@cache
def _model() -> Any:
    """Return the class of ModelProto."""
    scalars = {
        "text": descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
        "int64": descriptor_pb2.FieldDescriptorProto.TYPE_INT64,
        "int32": descriptor_pb2.FieldDescriptorProto.TYPE_INT32,
    }
    file = descriptor_pb2.FileDescriptorProto(name=f"{PACKAGE}.proto", package=PACKAGE, syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name.replace(".", ""))
        for field, (number, kind) in fields.items():
            repeated = kind.startswith("*")
            kind = kind.removeprefix("*")
            made = message.field.add(name=field, number=number)
            made.label = made.LABEL_REPEATED if repeated else made.LABEL_OPTIONAL
            made.type = scalars.get(kind, made.TYPE_MESSAGE)
            if kind not in scalars:
                made.type_name = f".{PACKAGE}.{kind.replace('.', '')}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.ModelProto"))
