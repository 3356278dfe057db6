"""The reader of weight.bin against coremltools' own storage library, and against damaged files."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from coremltools.libmilstoragepython import _BlobStorageReader as TheirReader
from coremltools.libmilstoragepython import _BlobStorageWriter as TheirWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.errors import H1ExportError
from h1export.targets.coreml.evaluator.blob import BlobFile
from h1export.targets.coreml.evaluator.dtypes import BY_BLOB, BY_NAME

Edit = Callable[[bytes], bytes]
THEIRS = {"fp32": "float"}  # the names of types in coremltools' methods
SEEDS = st.integers(0, 2**32 - 1)
PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)
# offsets in the first record
METADATA = 64
DATA = 128


def random(rng: np.random.Generator, dtype: str, count: int) -> np.ndarray:
    kind = BY_NAME[dtype]
    if kind.array.kind == "f":
        return rng.standard_normal(count).astype(kind.array)
    low, high = (-(1 << (kind.bits - 1)), 1 << (kind.bits - 1)) if kind.array.kind == "i" else (0, 1 << kind.bits)
    return rng.integers(low, high, count, dtype=np.int64).astype(kind.array)


def write(file: Path, arrays: list[tuple[str, np.ndarray]]) -> list[int]:
    """Write the arrays with coremltools, which takes fp16 as bits, and return their offsets."""
    writer = TheirWriter(str(file))
    return [
        getattr(writer, f"write_{THEIRS.get(dtype, dtype)}_data")(array.view(np.uint16) if dtype == "fp16" else array)
        for dtype, array in arrays
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blobs")


LISTS = st.lists(
    st.tuples(st.sampled_from(sorted(kind.name for kind in BY_BLOB.values())), st.integers(1, 200)),
    min_size=1,
    max_size=5,
)


@PROPERTY
@given(LISTS, SEEDS)
def test_what_coremltools_writes_is_read(folder: Path, kinds: list[tuple[str, int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = [(dtype, random(rng, dtype, count)) for dtype, count in kinds]
    offsets = write(folder / "written", arrays)
    file = BlobFile(folder / "written")
    theirs = TheirReader(str(folder / "written"))
    assert file.count == len(arrays)
    assert [record.offset for record in file.records()] == offsets
    for (dtype, array), offset in zip(arrays, offsets, strict=True):
        found = file.read(offset, BY_NAME[dtype], len(array))
        record = file.record(offset)
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)
        assert (record.dtype.name, record.count) == (dtype, len(array))
        other = np.asarray(getattr(theirs, f"read_{THEIRS.get(dtype, dtype)}_data")(offset))
        assert np.array_equal(found, other.view(np.float16) if dtype == "fp16" else other)


def test_every_type_that_they_write_is_known() -> None:
    methods = {
        name.removeprefix("write_").removesuffix("_data") for name in dir(TheirWriter) if name.startswith("write_")
    }
    assert methods == {THEIRS.get(kind.name, kind.name) for kind in BY_BLOB.values()}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A file of 100 fp16 numbers and 5 of 3 bits."""
    rng = np.random.default_rng(0)
    assert (
        write(tmp_path / "weight.bin", [("fp16", random(rng, "fp16", 100)), ("uint3", random(rng, "uint3", 5))])[0]
        == METADATA
    )
    return tmp_path / "weight.bin"


def cut(size: int) -> Edit:
    return lambda raw: raw[:size]


def put(at: int, layout: str, value: int) -> Edit:
    return lambda raw: raw[:at] + struct.pack(layout, value) + raw[at + struct.calcsize(layout) :]


def edit(file: Path, change: Edit) -> None:
    file.write_bytes(change(file.read_bytes()))


def refused(action: Callable[[], object], file: Path, what: str) -> None:
    """Check that the error is one line that names the file, the fault and the next step."""
    with pytest.raises(H1ExportError, match=what) as caught:
        action()
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)
    assert caught.value.next_step


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (cut(0), "has 0 bytes, less than its header of 64; the file is truncated"),
        (cut(63), "has 63 bytes"),
        (put(4, "<I", 1), "is of format version 1, not 2"),
    ],
)
def test_a_file_that_is_none_is_refused(whole: Path, change: Edit, what: str) -> None:
    edit(whole, change)
    refused(lambda: BlobFile(whole), whole, what)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name, what in {
        "missing": r"cannot be read \(No such file",
        "folder": "cannot be read|less than its header",
    }.items():
        refused(lambda file=tmp_path / name: BlobFile(file), tmp_path / name, what)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (cut(64), "metadata ends at byte 128 of 64; the file is truncated"),
        (cut(327), "data ends at byte 328 of 327; the file is truncated"),
        (put(METADATA, "<I", 0xDEADBEE0), "metadata starts with 0xdeadbee0 instead of 0xdeadbeef"),
        (put(METADATA + 4, "<I", 99), "holds elements of type 99, which is unknown"),
        (put(METADATA + 4, "<I", 0), "holds elements of type 0"),
        (put(METADATA + 4, "<I", 2), "holds fp32, and the program expects fp16"),
        (put(METADATA + 8, "<Q", 198), "holds 99 elements, and the program expects 100"),
        (put(METADATA + 8, "<Q", 199), "199 bytes without 0 bits are not a whole number of fp16 elements"),
        (put(METADATA + 8, "<Q", 2**64 - 2), "data ends at byte"),
        (put(METADATA + 16, "<Q", 2**63), "data ends at byte"),
        (put(METADATA + 16, "<Q", DATA + 2), "data at byte 130 is misaligned or before its metadata"),
        (put(METADATA + 16, "<Q", 0), "data at byte 0 is misaligned or before its metadata"),
        (put(METADATA + 24, "<Q", 16), "200 bytes without 16 bits are not a whole number of fp16 elements"),
        (
            put(METADATA + 24, "<Q", 2**64 - 1),
            "200 bytes without 18446744073709551615 bits are not a whole number of",
        ),
    ],
)
def test_a_damaged_record_is_refused(whole: Path, change: Edit, what: str) -> None:
    assert BlobFile(whole).read(METADATA, BY_NAME["fp16"], 100).size == 100
    edit(whole, change)
    refused(lambda: BlobFile(whole).read(METADATA, BY_NAME["fp16"], 100), whole, f"at byte 64: {what}")


@pytest.mark.parametrize(
    ("offset", "count", "what"),
    [
        (METADATA, 101, "at byte 64: holds 100 elements, and the program expects 101"),
        (METADATA, 0, "holds 100 elements, and the program expects 0"),
        (0, 100, "at byte 0: is not a valid offset of metadata"),
        (65, 100, "at byte 65: is not a valid offset of metadata"),
        (DATA, 100, "at byte 128: metadata starts with"),
        (1 << 20, 100, "at byte 1048576: metadata ends at byte 1048640 of"),
        (2**64 - 64, 100, "metadata ends at byte"),
    ],
)
def test_a_reference_that_leads_elsewhere_is_refused(whole: Path, offset: int, count: int, what: str) -> None:
    refused(lambda: BlobFile(whole).read(offset, BY_NAME["fp16"], count), whole, what)


def test_packed_elements_leave_bits_over(whole: Path) -> None:
    *_, last = BlobFile(whole).records()
    assert (last.nbytes, last.padding, last.count) == (2, 1, 5)
    edit(whole, put(last.offset + 24, "<Q", 4))  # 12 bits: 4 elements
    refused(
        lambda: BlobFile(whole).read(last.offset, BY_NAME["uint3"], 5),
        whole,
        "holds 4 elements, and the program expects 5",
    )
    edit(whole, put(last.offset + 24, "<Q", 2))
    refused(
        lambda: BlobFile(whole).record(last.offset),
        whole,
        "2 bytes without 2 bits are not a whole number of uint3",
    )


def test_more_records_than_the_file_has_are_refused(whole: Path) -> None:
    edit(whole, put(0, "<I", 2**32 - 1))
    refused(lambda: list(BlobFile(whole).records()), whole, "metadata ends at byte")


@PROPERTY
@given(st.data())
def test_no_damage_ends_in_a_traceback(folder: Path, data: st.DataObject) -> None:
    """After any change of header and metadata, a record is read or refused."""
    file = folder / "damaged"
    rng = np.random.default_rng(0)
    write(file, [(dtype, random(rng, dtype, 9)) for dtype in ("int4", "fp16", "uint3")])
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    with suppress(H1ExportError):
        found = BlobFile(file)
        for record in found.records():
            assert found.read(record.offset, record.dtype, record.count).shape == (record.count,)
