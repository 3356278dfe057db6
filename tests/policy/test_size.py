"""Files stay under 400 lines: when one grows, a concept is missing. ruff's PLR0915 and C901 check functions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MOST_LINES = 400
SOURCES = (".py", ".cc", ".cpp", ".cu", ".h", ".sh", ".toml", ".yaml")
OTHERS = ("targets/onnxruntime/include", "targets/tensorrt/plugin/include")  # headers of other projects


def long_files(files: tuple[Path, ...]) -> Iterator[str]:
    """Source files with too many lines."""
    for file in files:
        if file.suffix in SOURCES:
            lines = len(file.read_text(encoding="utf-8").splitlines())
            if lines > MOST_LINES:
                yield f"{file}: {lines} lines"


def test_no_file_is_too_long(root: Path, own_files: tuple[Path, ...]) -> None:
    ours = [file for file in own_files if not any(file.is_relative_to(root / folder) for folder in OTHERS)]
    found = list(long_files(tuple(ours)))
    assert not found, "\n".join(found)


def test_a_long_file_is_seen(tmp_path: Path) -> None:
    short = tmp_path / "short.py"
    long = tmp_path / "long.cpp"
    data = tmp_path / "long.txt"
    short.write_text("\n" * MOST_LINES)
    long.write_text("\n" * (MOST_LINES + 1))
    data.write_text("\n" * (MOST_LINES + 1))
    assert list(long_files((short, long, data))) == [f"{long}: {MOST_LINES + 1} lines"]
