"""The states of a sequence as llama.cpp saves them, and in the canonical layouts of StateSpec.

Keys and values first (llama_kv_cache::state_write), then the convolution's and the recurrent states
(llama_memory_recurrent::state_write). All numbers are little-endian; a row is one token, or one sequence. Values are
stored by column where flash attention is off.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array, StateKind, StateSpec, StateTensor

Bytes = npt.NDArray[np.uint8]
MAGIC = 0xAF143CD8  # io_magic of llama-context.cpp; the sequence follows
GGML_F32 = 0
BY_COLUMN = 1
UNNAMED = (0, 0)  # two numbers of this release before the keys: 0 for a cache in float32
FLOAT = 4


class StateFormatError(Exception):
    """The bytes are not those of this layout."""


class _Reader:
    def __init__(self, data: Bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, form: str) -> int:
        size = struct.calcsize(form)
        (value,) = struct.unpack_from(f"<{form}", self._data.data, self._at)
        self._at += size
        return int(value)

    def expect(self, form: str, *values: int) -> None:
        for value in values:
            if (found := self.number(form)) != value:
                raise StateFormatError(f"{found} where {value} should be, before byte {self._at}")

    def floats(self, shape: tuple[int, ...]) -> Array:
        count = int(np.prod(shape))
        found = self._data[self._at : self._at + FLOAT * count].view(np.float32)
        self._at += FLOAT * count
        return found.reshape(shape)

    def end(self) -> None:
        if self._at != len(self._data):
            raise StateFormatError(f"{len(self._data) - self._at} bytes more than this layout has")


def read(data: Bytes, config: FalconH1Config, length: int, *, sequence: int) -> dict[str, Array]:
    """Return the states of ``length`` tokens by ``StateTensor.key``, float32 with a batch of 1.

    Raises:
        StateFormatError: llama.cpp has saved them in another layout.
    """
    try:
        return _read(_Reader(np.ascontiguousarray(data)), config, length, sequence=sequence)
    except (struct.error, ValueError) as error:
        raise StateFormatError(str(error)) from None


def _read(reader: _Reader, config: FalconH1Config, length: int, *, sequence: int) -> dict[str, Array]:
    layers = config.num_hidden_layers
    heads, width = config.num_key_value_heads, config.head_dim
    reader.expect("I", MAGIC, sequence, 1, length)  # one stream of cells
    order = np.zeros(length, np.int64)
    for place in range(length):
        order[place] = reader.number("i")
        reader.expect("I", 1, sequence)  # one sequence has it
    if (np.sort(order) != np.arange(length)).any():
        raise StateFormatError("positions are not 0 to the last")
    places = np.argsort(order)
    reader.expect("I", BY_COLUMN, layers, *UNNAMED)
    found: dict[str, Array] = {}
    for layer in range(layers):
        reader.expect("i", GGML_F32)
        reader.expect("Q", FLOAT * heads * width)
        keys = reader.floats((length, heads, width))[places]
        found[_key(layer, StateKind.KEY)] = keys.transpose(1, 0, 2)[None]
    for layer in range(layers):
        reader.expect("i", GGML_F32)
        reader.expect("I", FLOAT, heads * width)
        values = reader.floats((heads, width, length))[..., places]
        found[_key(layer, StateKind.VALUE)] = values.transpose(0, 2, 1)[None]
    reader.expect("I", 1)  # sequences
    reader.expect("i", length - 1)
    reader.expect("I", 0, 0, layers)  # the sequence is not named; not by column
    for tensor in _recurrent(config):
        shape = tensor.sized(1, 0)
        reader.expect("i", GGML_F32)
        reader.expect("Q", FLOAT * int(np.prod(shape)))
        found[tensor.key] = reader.floats(shape)
    reader.end()
    return found


def write(states: dict[str, Array], config: FalconH1Config, length: int, *, sequence: int) -> Bytes:
    """Return what ``read`` takes: the bytes from which llama.cpp goes on."""
    layers = config.num_hidden_layers
    columns = config.num_key_value_heads * config.head_dim
    parts = [struct.pack("<IIII", MAGIC, sequence, 1, length)]
    parts += [struct.pack("<iII", place, 1, sequence) for place in range(length)]
    parts.append(struct.pack("<IIII", BY_COLUMN, layers, *UNNAMED))
    for layer in range(layers):
        parts.append(struct.pack("<iQ", GGML_F32, FLOAT * columns))
        parts.append(_bytes(states[_key(layer, StateKind.KEY)][0].transpose(1, 0, 2)))
    for layer in range(layers):
        parts.append(struct.pack("<iII", GGML_F32, FLOAT, columns))
        parts.append(_bytes(states[_key(layer, StateKind.VALUE)][0].transpose(0, 2, 1)))
    parts.append(struct.pack("<IiIII", 1, length - 1, 0, 0, layers))
    for tensor in _recurrent(config):
        parts.append(struct.pack("<iQ", GGML_F32, FLOAT * int(np.prod(tensor.sized(1, 0)))))
        parts.append(_bytes(states[tensor.key]))
    return np.frombuffer(b"".join(parts), np.uint8).copy()


def _recurrent(config: FalconH1Config) -> Iterator[StateTensor]:
    """Yield the states that are not by token, in llama.cpp's order: one kind after the other."""
    for kind in (StateKind.CONV, StateKind.RECURRENT):
        yield from (tensor for tensor in StateSpec.of(config).tensors if tensor.kind is kind)


def _key(layer: int, kind: StateKind) -> str:
    return StateTensor(layer, kind, ()).key


def _bytes(array: Array) -> bytes:
    return np.ascontiguousarray(array, np.float32).tobytes()
