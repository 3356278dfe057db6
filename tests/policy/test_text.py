"""Tracked texts name no machine's paths and contain no unfinished marks; ruff's FIX rules look for those in Python."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

# written so that this file does not match them
MACHINE = re.compile(r"(?<![\w.:/~-])/(?:root|home|Users|work|workspace|mnt|opt)/")
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
OTHERS = (
    "benchmarks/proxy/heldout.txt",
    "h1export/assets/",
    "targets/onnxruntime/include/",
    "targets/tensorrt/plugin/include/",
    "LICENSE",
)  # texts of other projects


def marks(text: str, pattern: re.Pattern[str]) -> list[int]:
    """Numbers of the lines that match."""
    return [number for number, line in enumerate(text.splitlines(), 1) if pattern.search(line)]


def found(root: Path, files: tuple[Path, ...], pattern: re.Pattern[str]) -> list[str]:
    """file:line of every match in the text files of our own."""
    lines = []
    for file in files:
        name = file.relative_to(root).as_posix()
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not text
        if not name.startswith(OTHERS):
            lines += [f"{name}:{number}" for number in marks(text, pattern)]
    return lines


@pytest.mark.parametrize("pattern", [MACHINE, UNFINISHED], ids=["machine paths", "unfinished marks"])
def test_no_marks_in_tracked_files(root: Path, own_files: tuple[Path, ...], pattern: re.Pattern[str]) -> None:
    files = own_files if pattern is MACHINE else tuple(file for file in own_files if file.suffix != ".py")
    lines = found(root, files, pattern)
    assert not lines, "\n".join(lines)


def test_the_checkout_itself_is_not_named(root: Path, own_files: tuple[Path, ...]) -> None:
    assert found(root, own_files, re.compile(re.escape(f"{root}/"))) == []


@pytest.mark.parametrize(
    "line", ["/" + "root/venv/bin/python", "see (/" + "home/me/x)", 'open("/' + 'Users/me")', "cd /" + "work/main"]
)
def test_a_machine_path_is_seen(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.md").write_text(line)
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00")
    assert found(tmp_path, (tmp_path / "a.md", tmp_path / "weights.bin"), MACHINE) == ["a.md:1"]


@pytest.mark.parametrize("line", ["# TO" + "DO: finish", "FIX" + "ME", "x  # XX" + "X"])
def test_an_unfinished_mark_is_seen(line: str) -> None:
    assert marks(f"first\n{line}", UNFINISHED) == [2]


@pytest.mark.parametrize(
    "line", ["https://example.org/home/x", "~/work/x", "a/root/b", "networks and opt/ions", "/usr/bin/env bash"]
)
def test_other_paths_are_not_a_machine(line: str) -> None:
    assert marks(line, MACHINE) == []
