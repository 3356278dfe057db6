"""The files for the Mac: they state the settings, and they need nothing but themselves."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.artifact.files import names
from h1export.errors import H1ExportError
from h1export.targets.coreml.mac import readme
from h1export.targets.coreml.mac.golden import lengths
from h1export.targets.coreml.mac.verify_on_mac import Settings, calls

FILES = ["Generate.swift", "README.md", "golden.npz", "mac.json", "verify_on_mac.py"]
MAC = Path(readme.__file__).parent


@settings(max_examples=200, deadline=None, derandomize=True)
@given(room=st.integers(2, 60), chunk=st.integers(1, 70), data=st.data())
def test_calls_cover_every_token_once_within_the_room(room: int, chunk: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, room))
    found = list(calls(length, Settings(room, chunk)))
    assert [token for _, position, count in found for token in range(position, position + count)] == list(range(length))
    for function, position, count in found:
        assert (function == "prefill") == (position + chunk <= room)
        assert 1 <= count <= (chunk if function == "prefill" else 1)


@pytest.mark.parametrize(
    ("chunk", "room", "available", "expected"),
    [
        (64, 4096, 10_000, (1, 63, 64, 65, 133, 4092)),
        (64, 4096, 70, (1, 63, 64, 65, 66)),
        (64, 96, 500, (1, 63, 64, 65, 92)),
        (64, 32, 500, (1, 28)),
        (1, 16, 500, (1, 2, 7, 12)),
    ],
)
def test_lengths_meet_every_cut_and_the_end(chunk: int, room: int, available: int, expected: tuple[int, ...]) -> None:
    assert lengths(chunk, room, available) == expected


def test_two_writes_give_the_same_bytes(tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        readme.write(folder, Settings(4096), b"golden")
        assert names(folder) == FILES
    assert [(tmp_path / "one" / name).read_bytes() for name in FILES] == [
        (tmp_path / "two" / name).read_bytes() for name in FILES
    ]
    assert json.loads((tmp_path / "one" / "mac.json").read_text(encoding="utf-8")) == dataclasses.asdict(Settings(4096))


@pytest.mark.parametrize("wrong", [Settings(64), Settings(0), Settings(4096, 0)], ids=str)
def test_settings_without_room(wrong: Settings, tmp_path: Path) -> None:
    with pytest.raises(H1ExportError, match="CoreML: a context of"):
        readme.write(tmp_path, wrong, b"")
    assert names(tmp_path) == []


def test_the_script_needs_only_numpy_and_coremltools() -> None:
    """The script is alone on a user's Mac, where h1export is not installed."""
    tree = ast.parse((MAC / "verify_on_mac.py").read_text(encoding="utf-8"))
    found = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    found |= {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    assert found - sys.stdlib_module_names == {"numpy"}
    assert 'import_module("coremltools")' in ast.unparse(tree).replace("'", '"')


def test_the_script_alone_says_what_is_missing(tmp_path: Path) -> None:
    """Without its files the script exits with code 2, because 1 would mean that the artifact is wrong."""
    script = tmp_path / "verify_on_mac.py"
    script.write_bytes((MAC / "verify_on_mac.py").read_bytes())
    run = subprocess.run([sys.executable, "-S", str(script), "--help"], check=False, capture_output=True, text=True)
    assert "ModuleNotFoundError" in run.stderr  # without site-packages there is no numpy
    run = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("verify_on_mac: mac.json cannot be read")


@pytest.mark.parametrize("state_io", [False, True])
@pytest.mark.parametrize("last_logits", [False, True])
def test_the_readme_says_the_settings(state_io: bool, last_logits: bool) -> None:
    text = readme.text(Settings(1234, 56, "CPU_AND_NE", state_io=state_io, last_logits=last_logits))
    assert "Not run by us on Apple hardware" in text
    assert "`position` + 56 must not exceed 1234" in text
    assert "input_ids` int32 [1, 56]" in text
    assert "Made for `CPU_AND_NE`" in text
    assert "int4 with a scale for each 32 columns is meant for `CPU_AND_GPU`" in text
    assert ("make_state" in text) != state_io
    assert ("present_N_key" in text) == state_io
    assert ("of the last valid token" in text) == last_logits
    assert not re.search(r"[{}]{2}|\n\n\n", text)
    assert all(len(line) <= 140 for line in text.splitlines() if not line.startswith(("|", "past =", "prefill,")))


def test_the_swift_sample_reads_our_settings() -> None:
    text = (MAC / "Generate.swift").read_text(encoding="utf-8")
    assert "NOT COMPILED OR RUN BY US" in text.splitlines()[1]
    assert len(text.splitlines()) < 100
    (fields,) = re.findall(r"struct Settings: Decodable \{.*?\n(.*?)\n\}", text, re.DOTALL)
    assert re.findall(r"(\w+): \w+", fields) == [field.name for field in dataclasses.fields(Settings)]
    for pair in ("{}", "()", "[]"):
        assert text.count(pair[0]) == text.count(pair[1])
