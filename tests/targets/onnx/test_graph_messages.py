"""The table of messages against the package onnx: numbers, types, and every field that has texts or tensors inside."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from google.protobuf.descriptor import FieldDescriptor
from onnx import TensorProto

from h1export.targets.onnx import graph_messages as messages

NUMBERS = {"*int64": FieldDescriptor.TYPE_INT64, "int32": FieldDescriptor.TYPE_INT32}


def described() -> dict[str, dict[str, tuple[int, str]]]:
    """The fields of onnx that are texts, or messages with texts somewhere inside, in the form of the table."""
    found: dict[str, Any] = {}

    def walk(descriptor: Any) -> None:
        name = descriptor.full_name.removeprefix("onnx.")
        if name not in found:
            found[name] = descriptor
            for field in descriptor.fields:
                if field.message_type:
                    walk(field.message_type)

    walk(onnx.ModelProto.DESCRIPTOR)
    has_text = {
        name for name, one in found.items() if any(field.type == FieldDescriptor.TYPE_STRING for field in one.fields)
    }
    while True:
        more = {
            name
            for name, one in found.items()
            if any(field.message_type and field.message_type.full_name[5:] in has_text for field in one.fields)
        }
        if more <= has_text:
            break
        has_text |= more
    table: dict[str, dict[str, tuple[int, str]]] = {}
    for name in has_text:
        for field in found[name].fields:
            star = "*" * field.is_repeated
            if field.type == FieldDescriptor.TYPE_STRING:
                table.setdefault(name, {})[field.name] = field.number, f"{star}text"
            elif field.message_type and field.message_type.full_name[5:] in has_text:
                table.setdefault(name, {})[field.name] = field.number, star + field.message_type.full_name[5:]
    return table


def test_every_text_of_onnx_is_in_the_table() -> None:
    numbers = {"dims", "data_type", "data_location"}
    ours = {
        name: {field: how for field, how in fields.items() if field not in numbers}
        for name, fields in messages.MESSAGES.items()
    }
    assert ours == described()


@pytest.mark.parametrize("name", ["dims", "data_type", "data_location"])
def test_numbers_are_those_of_onnx(name: str) -> None:
    field = TensorProto.DESCRIPTOR.fields_by_name[name]
    number, kind = messages.MESSAGES["TensorProto"][name]
    assert field.number == number
    assert field.type in (NUMBERS[kind], FieldDescriptor.TYPE_ENUM)


def test_constants_are_those_of_onnx() -> None:
    for name in ("FLOAT", "UINT8", "INT8", "INT32", "INT64", "FLOAT16", "BFLOAT16", "INT4", "EXTERNAL"):
        assert getattr(messages, name) == getattr(TensorProto, name)
