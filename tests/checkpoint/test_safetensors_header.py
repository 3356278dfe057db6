"""The safetensors header: every way to damage a real file ends in an error that names file, tensor and next step."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from h1export.checkpoint.safetensors_header import MAX_HEADER_BYTES, read_header
from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config

ReadHeader = Callable[[Path], tuple[dict[str, Any], bytes]]
EditHeader = Callable[[Path, Callable[[dict[str, Any]], object]], None]
Write = Callable[..., Path]

FLOATS = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def refused(file: Path, *mentioned: str) -> None:
    """Assert that ``file`` is refused by name, with the texts ``mentioned`` and a next step, and by the library too."""
    with pytest.raises(H1ExportError) as caught:
        read_header(file)
    message = str(caught.value)
    assert message.startswith(str(file)), message
    assert all(text in message for text in mentioned), message
    assert caught.value.next_step
    with pytest.raises((SafetensorError, OSError)), safe_open(file, "np") as opened:
        list(opened.keys())


@pytest.fixture(scope="module")
def one_layer(make_checkpoint: Callable[..., Path]) -> Path:
    """The file of a real checkpoint, which tests must not change."""
    return make_checkpoint("plain", num_hidden_layers=1) / "model.safetensors"


@pytest.fixture
def damaged(one_layer: Path, tmp_path: Path) -> Path:
    """A copy of the real file, for tests to damage."""
    return Path(shutil.copyfile(one_layer, tmp_path / "model.safetensors"))


def test_a_sound_file_gives_the_librarys_table_in_order_of_offset(one_layer: Path) -> None:
    entries = read_header(one_layer)
    with safe_open(one_layer, "pt") as opened:
        theirs = {
            name: (opened.get_slice(name).get_dtype(), tuple(opened.get_slice(name).get_shape()))
            for name in opened.keys()  # noqa: SIM118  safe_open cannot be iterated
        }
    assert {entry.name: (entry.dtype, entry.shape) for entry in entries} == theirs
    assert [entry.start for entry in entries] == sorted(entry.start for entry in entries)
    assert entries[-1].start + entries[-1].nbytes == one_layer.stat().st_size


def test_truncation_at_any_byte(one_layer: Path, tmp_path: Path, read_safetensors: ReadHeader) -> None:
    """In a file that is truncated inside the data, the error names the first tensor that is cut."""
    content = one_layer.read_bytes()
    header, data = read_safetensors(one_layer)
    base = len(content) - len(data)
    by_end = sorted((base + info["data_offsets"][1], name) for name, info in header.items() if name != "__metadata__")
    edges = {end + step for end, _ in by_end for step in (-1, 0, 1)}
    cuts = {0, 1, 7, 8, 9, base // 2, base - 1, base, base + 1, *range(0, len(content), len(content) // 50), *edges}
    for cut in sorted(cut for cut in cuts if cut < len(content)):
        file = tmp_path / f"cut-{cut}.safetensors"
        file.write_bytes(content[:cut])
        if cut < 8:
            refused(file, f"{cut} bytes are too few", "download it again")
        elif cut < base:
            refused(file, f"header ends at byte {base} of {cut}", "truncated, download it again")
        else:
            end, name = next((end, name) for end, name in by_end if end > cut)
            refused(file, f'tensor "{name}"', f"ends at byte {end} of {cut}", "truncated, download it again")
        file.unlink()


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 1 << 32, 1 << 63, (1 << 64) - 1])
def test_a_header_longer_than_the_format_allows(length: int, tmp_path: Path) -> None:
    """The file is (sparsely) long enough, where that is possible, so it is the limit that refuses it."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length))
    os.truncate(file, 8 + min(length, 1 << 33))
    refused(file, f"header of {length} bytes", str(MAX_HEADER_BYTES))


def test_a_header_longer_than_the_file(damaged: Path) -> None:
    size = damaged.stat().st_size
    with damaged.open("r+b") as stream:
        stream.write(struct.pack("<Q", size))
    refused(damaged, f"header ends at byte {size + 8} of {size}", "download it again")


@pytest.mark.parametrize("shift", [-1, 1, 8, -8])
def test_a_header_length_that_is_off(shift: int, damaged: Path) -> None:
    with damaged.open("r+b") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        stream.seek(0)
        stream.write(struct.pack("<Q", length + shift))
    refused(damaged, "download it again")


def first(header: dict[str, Any]) -> dict[str, Any]:
    """The description of the tensor at the beginning of the data."""
    return next(info for info in header.values() if info.get("data_offsets", [1])[0] == 0)


def change_first(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda header: first(header).update(changes)


@pytest.mark.parametrize(
    ("change", "mentioned"),
    [
        (change_first(dtype="F64"), ("dtype 'F64'", "F32, F16, BF16")),
        (change_first(dtype="U64"), ("dtype 'U64'", "F32, F16, BF16")),
        (change_first(dtype="F8_E4M3"), ("dtype 'F8_E4M3'",)),
        (change_first(dtype="bf16"), ("dtype 'bf16'",)),
        (change_first(dtype=None), ("dtype None",)),
        (change_first(dtype=7), ("dtype 7",)),
        (change_first(dtype="F32"), ("cannot be stored at data_offsets", "F32")),
        (change_first(shape=[1]), ("shape [1]", "cannot be stored at")),
        (change_first(shape=[]), ("shape []", "cannot be stored at")),
        (change_first(shape=[0]), ("shape [0]", "cannot be stored at")),
        (change_first(shape=[1 << 62, 1 << 62]), ("cannot be stored at",)),
        (change_first(shape=[-1]), ("shape [-1]",)),
        (change_first(shape=[1.0]), ("shape [1.0]",)),
        (change_first(shape=[True]), ("shape [True]",)),
        (change_first(shape="1"), ("shape '1'",)),
        (change_first(shape=None), ("shape None",)),
        (change_first(data_offsets=[-4, 4]), ("data_offsets [-4, 4]",)),
        (change_first(data_offsets=[4, 0]), ("data_offsets [4, 0]",)),
        (change_first(data_offsets=[0]), ("data_offsets [0]",)),
        (change_first(data_offsets=[0, 1, 2]), ("data_offsets [0, 1, 2]",)),
        (change_first(data_offsets=[0, "4"]), ("data_offsets [0, '4']",)),
        (change_first(data_offsets=None), ("data_offsets None",)),
        (lambda header: first(header).pop("dtype"), ("dtype None",)),
        (lambda header: first(header).pop("shape"), ("shape None",)),
        (lambda header: first(header).pop("data_offsets"), ("data_offsets None",)),
    ],
)
def test_bad_descriptions(
    change: Callable[[dict[str, Any]], object], mentioned: tuple[str, ...], damaged: Path, edit_header: EditHeader
) -> None:
    name = read_header(damaged)[0].name
    edit_header(damaged, change)
    refused(damaged, f'tensor "{name}"', *mentioned)


@pytest.mark.parametrize("info", [None, 1, "F32", [], True], ids=str)
def test_a_tensor_without_a_description(info: object, damaged: Path, edit_header: EditHeader) -> None:
    edit_header(damaged, lambda header: header.update({"extra": info}))
    refused(damaged, 'tensor "extra"', "no description")


@pytest.mark.parametrize("dtype", [[], {}], ids=str)
def test_a_dtype_that_is_a_container(dtype: object, damaged: Path, edit_header: EditHeader) -> None:
    edit_header(damaged, change_first(dtype=dtype))
    refused(damaged, "dtype")


def test_two_tensors_over_the_same_bytes(write_safetensors: Write, tmp_path: Path) -> None:
    header = {"a": FLOATS, "b": FLOATS | {"data_offsets": [4, 12]}}
    refused(write_safetensors(tmp_path / "x.safetensors", header, bytes(12)), 'tensor "b"', 'inside tensor "a"')


def test_the_very_same_range_twice(write_safetensors: Write, tmp_path: Path) -> None:
    refused(
        write_safetensors(tmp_path / "x.safetensors", {"a": FLOATS, "b": FLOATS}, bytes(8)),
        'tensor "b"',
        'inside tensor "a"',
    )


def test_a_hole_between_tensors(write_safetensors: Write, tmp_path: Path) -> None:
    header = {"b": FLOATS | {"data_offsets": [12, 20]}, "a": FLOATS}
    refused(write_safetensors(tmp_path / "x.safetensors", header, bytes(20)), 'tensor "b"', '4 bytes after tensor "a"')


def test_a_hole_before_the_first_tensor(write_safetensors: Write, tmp_path: Path) -> None:
    header = {"a": FLOATS | {"data_offsets": [1, 9]}}
    refused(write_safetensors(tmp_path / "x.safetensors", header, bytes(9)), 'tensor "a"', "1 bytes after the header")


def test_bytes_after_the_last_tensor(damaged: Path) -> None:
    with damaged.open("ab") as stream:
        stream.write(b"abc")
    refused(damaged, "3 bytes after the last tensor")


def test_data_without_a_tensor(write_safetensors: Write, tmp_path: Path) -> None:
    refused(write_safetensors(tmp_path / "x.safetensors", {}, b"abc"), "3 bytes after the last tensor")


def test_a_name_twice(write_safetensors: Write, tmp_path: Path) -> None:
    text = json.dumps(FLOATS)
    file = write_safetensors(tmp_path / "x.safetensors", f'{{"a":{text},"a":{text}}}'.encode(), bytes(8))
    with pytest.raises(H1ExportError, match=r"x\.safetensors: .*twice.*; the file is damaged"):
        read_header(file)


def test_a_key_twice_inside_a_description(write_safetensors: Write, tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}'
    refused(write_safetensors(tmp_path / "x.safetensors", text, bytes(8)), "twice")


BROKEN_HEADERS: dict[str, bytes] = {
    "no bytes": b"",
    "not utf-8": b'{"\xff":1}',
    "utf-8 with a mark": b"\xef\xbb\xbf{}",
    "cut": b'{"a":{"dtype":"F32"',
    "two objects": b"{}{}",
    "a list": b"[]",
    "a string": b'"F32"',
    "null": b"null",
    "zeros": bytes(64),
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "an integer of 5000 digits": b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}',
    "a control character in a name": b'{"a\x01":1}',
}


@pytest.mark.parametrize("name", BROKEN_HEADERS)
def test_headers_that_are_not_a_json_object(name: str, write_safetensors: Write, tmp_path: Path) -> None:
    refused(
        write_safetensors(tmp_path / "x.safetensors", BROKEN_HEADERS[name], bytes(8)),
        "header is not",
        "download it again",
    )


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    refused(tmp_path / "model.safetensors", "0 bytes are too few", "download it again")


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path / "model.safetensors", "not a regular file")


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(H1ExportError, match="not a regular file"):
        read_header(tmp_path / "model.safetensors")


def test_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "model.safetensors", "cannot be read", "check the path")


def test_a_file_that_may_not_be_opened(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal is simulated, because the superuser may open every file."""

    def refuse(*_: object) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        H1ExportError,
        match=r"model\.safetensors: cannot be read \(Permission denied\); check the path and its permissions",
    ):
        read_header(damaged)


def test_empty_tensors_and_odd_offsets_are_allowed(write_safetensors: Write, tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [6, 10]},
        "empty": {"dtype": "F32", "shape": [0, 4], "data_offsets": [6, 6]},
        "a": {"dtype": "BF16", "shape": [3, 1], "data_offsets": [0, 6]},
    }
    file = write_safetensors(tmp_path / "x.safetensors", header, bytes(10))
    base = file.stat().st_size - 10
    assert [(e.name, e.shape, e.start - base, e.nbytes) for e in read_header(file)] == [
        ("a", (3, 1), 0, 6),
        ("empty", (0, 4), 6, 0),
        ("b", (), 6, 4),
    ]


def test_metadata_is_not_a_tensor(damaged: Path, edit_header: EditHeader) -> None:
    before = [(entry.name, entry.dtype, entry.shape) for entry in read_header(damaged)]
    edit_header(damaged, lambda header: header.update({"__metadata__": {"note": "x" * 5}}))
    assert [(entry.name, entry.dtype, entry.shape) for entry in read_header(damaged)] == before


@pytest.fixture(scope="module")
def flippable(one_layer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FalconH1Config, Path, bytes]:
    """(config, a checkpoint file that is overwritten for each example, its valid bytes)."""
    folder = tmp_path_factory.mktemp("flips")
    return (
        FalconH1Config.load(one_layer.parent),
        Path(shutil.copyfile(one_layer, folder / "model.safetensors")),
        one_layer.read_bytes(),
    )


def open_or_error(folder: Path, config: FalconH1Config) -> WeightStore | H1ExportError:
    try:
        return WeightStore.open(folder, config)
    except H1ExportError as error:
        return error


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.data())
def test_random_bytes_in_the_header(flippable: tuple[FalconH1Config, Path, bytes], data: st.DataObject) -> None:
    """The store refuses the file or has the same table as before, and the library accepts what the store accepts."""
    config, file, sound = flippable
    end = 8 + struct.unpack("<Q", sound[:8])[0]
    changes = data.draw(st.lists(st.tuples(st.integers(0, end - 1), st.integers(0, 255)), min_size=1, max_size=3))
    header = bytearray(sound[:end])
    for position, value in changes:
        header[position] = value
    with file.open("r+b") as stream:
        stream.write(header)
    found = open_or_error(file.parent, config)
    if isinstance(found, H1ExportError):
        assert str(file.parent) in str(found)
        assert found.next_step
        return
    with safe_open(file, "np") as opened:
        assert set(opened.keys()) == {entry.name for entry in found.entries}
    table = {(entry.name, entry.dtype, entry.shape, entry.start) for entry in found.entries}
    file.write_bytes(sound)
    assert table == {(entry.name, entry.dtype, entry.shape, entry.start) for entry in read_header(file)}


@st.composite
def nearly_sound(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """(header, bytes of data): consecutive tensors, sometimes with a changed offset, dimension or end."""
    off = st.sampled_from([0] * 12 + [-2, -1, 1, 2])
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.permutations("abcd"))[: draw(st.integers(0, 4))]:
        dtype = draw(st.sampled_from(["F32", "F16", "BF16"]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        start = end
        end = end + math.prod(shape) * (4 if dtype == "F32" else 2)
        moved = [dimension + draw(off) for dimension in shape]
        header[name] = {"dtype": dtype, "shape": moved, "data_offsets": [start + draw(off), end + draw(off)]}
    return {name: header[name] for name in draw(st.permutations(sorted(header)))}, max(0, end + draw(off))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(nearly_sound())
def test_a_table_is_accepted_exactly_where_the_library_accepts_it(
    write_safetensors: Write, tmp_path_factory: pytest.TempPathFactory, table: tuple[dict[str, Any], int]
) -> None:
    header, size = table
    file = write_safetensors(tmp_path_factory.getbasetemp() / "random.safetensors", header, bytes(size))
    base = file.stat().st_size - size
    try:
        with safe_open(file, "np") as opened:
            names = set(opened.keys())
    except SafetensorError:
        with pytest.raises(H1ExportError, match=re.escape(str(file))):
            read_header(file)
    else:
        entries = read_header(file)
        assert {entry.name for entry in entries} == names
        covered = [byte - base for entry in entries for byte in range(entry.start, entry.start + entry.nbytes)]
        assert covered == list(range(size))
