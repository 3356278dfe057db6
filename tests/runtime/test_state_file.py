"""State files: what was written is read bit for bit, and whatever else is one line."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateSpec
from h1export.runtime import state_file
from h1export.runtime.continued import Continued
from h1export.runtime.saved_states import SavedStates
from h1export.runtime.state_file import StateFile

TOKENS = 5
MESSAGES = [
    {"role": "system", "content": "Be «brief»\n[bold]\x1b"},
    {"role": "user", "content": "漢字"},
    {"role": "assistant", "content": ""},
]


@pytest.fixture(scope="session")
def config(config_of: Callable[..., FalconH1Config]) -> FalconH1Config:
    return config_of(num_hidden_layers=2)


@pytest.fixture
def saved(config: FalconH1Config) -> StateFile:
    random = np.random.default_rng(0)
    arrays = {
        tensor.key: random.standard_normal(tensor.sized(1, TOKENS), np.float32)
        for tensor in StateSpec.of(config).tensors
    }
    return StateFile("abc", MESSAGES, Continued((1, 2, 3, 2, 0), SavedStates(0, TOKENS, arrays)))


@pytest.fixture
def path(saved: StateFile, tmp_path: Path) -> Path:
    saved.write(tmp_path / "talk.safetensors")
    return tmp_path / "talk.safetensors"


def test_it_comes_back_bit_for_bit(saved: StateFile, path: Path, config: FalconH1Config) -> None:
    found = StateFile.read(path, "abc", config)
    assert (found.artifact, found.messages, found.sequence.ids) == ("abc", MESSAGES, (1, 2, 3, 2, 0))
    assert found.sequence.states.arrays.keys() == saved.sequence.states.arrays.keys()
    for key, array in saved.sequence.states.arrays.items():
        assert np.array_equal(found.sequence.states.arrays[key], array)
    assert os.listdir(path.parent) == [path.name]


def test_only_a_state_file_is_replaced(saved: StateFile, path: Path, config: FalconH1Config) -> None:
    replace(saved, messages=MESSAGES[:1]).write(path)
    assert StateFile.read(path, "abc", config).messages == MESSAGES[:1]
    for name, text in (("letter.txt", b"Dear"), ("model.safetensors", None), ("folder", None)):
        other = path.parent / name
        if name == "folder":
            other.mkdir()
        elif text is None:
            save_file({"x": np.zeros(3)}, other)
        else:
            other.write_bytes(text)
        before = None if other.is_dir() else other.read_bytes()
        with pytest.raises(H1ExportError, match="exists, and is no saved chat; choose another name"):
            saved.write(other)
        assert before is None or other.read_bytes() == before
    assert len(os.listdir(path.parent)) == 4


def test_what_cannot_be_written_leaves_nothing(
    saved: StateFile, path: Path, tmp_path: Path, config: FalconH1Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("missing/talk", "x" * 300, "nul\0", "talk.safetensors/talk"):
        with pytest.raises(H1ExportError, match="cannot be written"):
            saved.write(tmp_path / name)

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    for target in (path, tmp_path / "new.safetensors"):
        with pytest.raises(H1ExportError, match="cannot be written \\(No space left on device\\)"):
            saved.write(target)
    assert os.listdir(tmp_path) == [path.name]
    assert StateFile.read(path, "abc", config).messages == MESSAGES


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(path: Path, header: Any, body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def changed(key: str, value: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        header, body = parts(path)
        header["__metadata__"][key] = value
        with_header(path, header, body)

    return change


def entry(name: str, **values: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        header, body = parts(path)
        header[name].update(values)
        with_header(path, header, body)

    return change


def cut(size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def flipped(place: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)

    return change


def rewritten(change: Callable[[dict[str, Any]], Any], ids: Any = (1, 2, 3, 2, 0)) -> Callable[[Path], None]:
    """A file that says of itself that it is whole, with other arrays."""

    def write(path: Path) -> None:
        header, _ = parts(path)
        with state_file.safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        arrays["ids"] = np.array(ids, np.int64)
        change(arrays)
        metadata = {**header["__metadata__"], "sha256": state_file._digest(arrays, header["__metadata__"]["messages"])}
        save_file(arrays, path, metadata)

    return write


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def sparse(path: Path) -> None:
    header, _ = parts(path)
    size = 8 << 30
    header["ids"]["data_offsets"] = [0, size]
    header["ids"]["shape"] = [size // 8]
    with_header(path, {"__metadata__": header["__metadata__"], "ids": header["ids"]}, b"")
    os.truncate(path, path.stat().st_size + size)


def nan(arrays: dict[str, Any]) -> None:
    arrays["1.recurrent_state"][0, 0, 0, 0] = np.nan


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "empty": cut(0),
    "seven_bytes": cut(7),
    "header_only": cut(100),
    "cut": cut(-1),
    "long": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "text": lambda path: path.write_text("Dear reader, this is no state."),
    "zeros": lambda path: path.write_bytes(bytes(100)),
    "huge_header": lambda path: path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}" * 50),
    "deep": lambda path: path.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000),
    "fifo": fifo,
    "folder": folder,
    "missing": os.unlink,
    "sparse": sparse,
    "flipped_state": flipped(-5),
    "flipped_header": flipped(9),
    "other_format": changed("format", "h1export-states-2"),
    "other_artifact": changed("artifact", "abd"),
    "number_in_metadata": changed("artifact", 7),
    "other_messages": changed("messages", json.dumps(MESSAGES[:2])),
    "no_messages": changed("messages", ""),
    "messages_of_numbers": changed("messages", "[1]"),
    "messages_of_lists": changed("messages", '[{"role": "user", "content": []}]'),
    "message_without_role": changed("messages", '[{"content": "x"}]'),
    "deep_messages": changed("messages", "[" * 100_000),
    "other_digest": changed("sha256", "0"),
    "other_dtype": entry("0.key", dtype="I32"),
    "other_shape": entry("0.key", shape=[1]),
    "overlap": entry("0.key", data_offsets=[0, 8]),
    "huge_shape": entry("ids", shape=[1 << 62, 1 << 62]),
    "negative": entry("ids", shape=[-5]),
    "nan": rewritten(nan),
    "no_tokens": rewritten(lambda arrays: None, ids=()),
    "more_tokens": rewritten(lambda arrays: None, ids=range(6)),
    "tokens_of_two_axes": rewritten(lambda arrays: None, ids=[[1, 2, 3, 4, 5]]),
    "wrong_token": rewritten(lambda arrays: None, ids=(1, 2, 3, 2, 1 << 40)),
    "negative_token": rewritten(lambda arrays: None, ids=(1, 2, 3, 2, -1)),
    "missing_state": rewritten(lambda arrays: arrays.pop("1.conv_state")),
    "another_state": rewritten(lambda arrays: arrays.update(more=np.zeros(2))),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_anything_else_is_one_short_line(path: Path, config: FalconH1Config, kind: str) -> None:
    HOSTILE[kind](path)
    with pytest.raises(H1ExportError) as caught:
        StateFile.read(path, "abc", config)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    assert len(line) - len(str(path)) < 200


def test_flipped_bits_anywhere(saved: StateFile, path: Path, config: FalconH1Config) -> None:
    """A bit of the header or of the data: an error, or the same content."""
    data = path.read_bytes()
    for place in np.random.default_rng(1).integers(0, len(data), 60):
        path.write_bytes(data)
        flipped(int(place))(path)
        try:
            found = StateFile.read(path, "abc", config)
        except H1ExportError:
            continue
        assert (found.messages, found.sequence.ids) == (saved.messages, saved.sequence.ids)
        assert all(np.array_equal(found.sequence.states.arrays[k], v) for k, v in saved.sequence.states.arrays.items())
