"""One node of ours in tools/wheels: the kernels of a library without ONNX Runtime, also of another CPU's library.

``nox -s wheels`` sets H1EXPORT_KERNEL_HOST to the command; then the numeric tests of tests/targets/onnxruntime/native
compute in it, and no other library is compiled.
"""

from __future__ import annotations

import io
import os
import shlex
import struct
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import helper

VARIABLE = "H1EXPORT_KERNEL_HOST"
ABSENT = -1


def command() -> list[str]:
    """The words of the command, or none."""
    return shlex.split(os.environ.get(VARIABLE, ""))


def compute(
    words: Sequence[str],
    op: str,
    inputs: Mapping[str, Any],
    outputs: int,
    threads: int,
    attributes: Mapping[str, Any],
    in_place: Mapping[int, int] | None = None,
) -> list[Any]:
    """Compute one node; ``in_place``: output -> the input whose memory it is."""
    reals = {name: value for name, value in attributes.items() if isinstance(value, float)}
    integers = {name: value for name, value in attributes.items() if name not in reals}
    parts = [text(op), *named(integers, "q"), *named(reals, "f")]
    parts += [struct.pack("<I", len(inputs)), *(tensor(value) for value in inputs.values())]
    places = in_place or {}
    parts.append(struct.pack("<II", outputs, len(places)))
    parts += [struct.pack("<II", *pair) for pair in places.items()]
    parts.append(struct.pack("<I", threads))
    done = subprocess.run(words, input=b"".join(parts), capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    answer = io.BytesIO(done.stdout)
    (length,) = struct.unpack("<I", answer.read(4))
    if length:
        raise RuntimeError(answer.read(length).decode())
    (count,) = struct.unpack("<I", answer.read(4))
    found = [array(answer) for _ in range(count)]
    assert not answer.read()
    return found


def text(value: str) -> bytes:
    return struct.pack("<I", len(value)) + value.encode()


def named(values: Mapping[str, Any], kind: str) -> list[bytes]:
    return [struct.pack("<I", len(values)), *(text(name) + struct.pack(f"<{kind}", v) for name, v in values.items())]


def tensor(value: Any) -> bytes:
    if value is None:
        return struct.pack("<i", ABSENT)
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    return struct.pack(f"<iI{value.ndim}q", kind, value.ndim, *value.shape) + np.ascontiguousarray(value).tobytes()


def array(answer: io.BytesIO) -> Any:
    kind, rank = struct.unpack("<iI", answer.read(8))
    shape = struct.unpack(f"<{rank}q", answer.read(8 * rank))
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(answer.read(count * dtype.itemsize), dtype).reshape(shape)
