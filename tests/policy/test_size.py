"""Files stay under 400 lines and functions under 50: when one grows, a concept is missing."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

MOST_LINES = 400
MOST_LINES_OF_A_FUNCTION = 50
SOURCES = (".py", ".cc", ".cpp", ".cu", ".h", ".sh", ".toml", ".yaml")
OTHERS = (
    "targets/onnxruntime/include",
    "targets/tensorrt/plugin/include",
)  # headers that we carry and have not written


def long_functions(tree: ast.Module) -> Iterator[str]:
    """Functions with too many lines, the signature and the docstring counted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MOST_LINES_OF_A_FUNCTION:
                yield f"{node.name}: {lines} lines"


def long_files(files: tuple[Path, ...]) -> Iterator[str]:
    """Source files with too many lines."""
    for file in files:
        if file.suffix in SOURCES:
            lines = len(file.read_text(encoding="utf-8").splitlines())
            if lines > MOST_LINES:
                yield f"{file}: {lines} lines"


def test_no_file_is_too_long(root: Path, own_files: tuple[Path, ...]) -> None:
    found = list(
        long_files(
            tuple(file for file in own_files if not any(file.is_relative_to(root / folder) for folder in OTHERS))
        )
    )
    assert not found, "\n".join(found)


def test_no_function_is_too_long(trees: Mapping[str, ast.Module]) -> None:
    found = [f"{module}.{function}" for module, tree in trees.items() for function in long_functions(tree)]
    assert not found, "\n".join(found)


def test_a_long_function_is_seen() -> None:
    body = "    x = 0\n" * (MOST_LINES_OF_A_FUNCTION - 1)
    assert list(long_functions(ast.parse(f"def f():\n{body}"))) == []
    assert list(long_functions(ast.parse(f"class C:\n  async def f():\n{body}    x = 0\n"))) == [
        f"f: {MOST_LINES_OF_A_FUNCTION + 1} lines"
    ]


def test_a_long_file_is_seen(tmp_path: Path) -> None:
    short = tmp_path / "short.py"
    long = tmp_path / "long.cpp"
    data = tmp_path / "long.txt"
    short.write_text("\n" * MOST_LINES)
    long.write_text("\n" * (MOST_LINES + 1))
    data.write_text("\n" * (MOST_LINES + 1))
    assert list(long_files((short, long, data))) == [f"{long}: {MOST_LINES + 1} lines"]
