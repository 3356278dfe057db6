"""Commands write files with h1export/writing.py, and builds into a stage: nothing else may leave half a file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

WRITES = {"write_text", "write_bytes", "save", "savez", "savez_compressed", "tofile", "save_file", "touch"}
# they write to the null device, into the stage of a build, a new folder of the cache, or a file that writing.py yields
IN_A_STAGE = {"cli/streams.py", "commands/build.py", "runtime/code_cache.py", "runtime/state_file.py"}
FOLDERS = (
    "h1export/cli",
    "h1export/commands",
    "h1export/integrations",
    "h1export/report",
    "h1export/runtime",
    "validate",
)
EXAMPLES = [
    "path.write_text('x')",
    "path.open('w')",
    "open(path, 'wb')",
    "np.savez(path, a=1)",
    "open(path, mode='a')",
    "np.memmap(path, dtype, 'r+')",
    "os.open(path, os.O_WRONLY)",
]
HARMLESS = [
    "open(path)",
    "path.open('rb')",
    "np.memmap(path, dtype, 'r')",
    "path.read_text()",
    "np.savez(content, a=1)",
]


def mode(call: ast.Call) -> str:
    """Return the mode in which a call opens a file; of np.memmap it is the third argument."""
    named = [word.value for word in call.keywords if word.arg == "mode"]
    values = [node.value for node in (*call.args, *named) if isinstance(node, ast.Constant)]
    return "".join(value for value in values if isinstance(value, str) and set(value) <= set("rwxabt+"))


def writes(text: str) -> Iterator[int]:
    """Yield the lines that write to a file in place."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        into_memory = bool(node.args) and isinstance(node.args[0], ast.Name) and node.args[0].id == "content"
        flags = ast.unparse(node).split("O_")[1:]
        if (
            (name in WRITES and not into_memory and not is_of_a_session(node))
            or (name in ("open", "memmap", "fdopen") and set(mode(node)) & set("wxa+"))
            or (name == "open" and any(flag.startswith(("WRONLY", "RDWR", "CREAT")) for flag in flags))
        ):
            yield node.lineno


def is_of_a_session(call: ast.Call) -> bool:
    """Return whether a call is `save` of a session or a chat, which gives it to a state file."""
    return isinstance(call.func, ast.Attribute) and call.func.attr == "save" and "np" not in ast.unparse(call.func)


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_write_in_place_is_seen(example: str) -> None:
    assert list(writes(example)) == [1]


@pytest.mark.parametrize("example", HARMLESS)
def test_what_only_reads_is_not(example: str) -> None:
    assert list(writes(example)) == []


def test_commands_write_in_place_nowhere(root: Path) -> None:
    found = [
        f"{file.relative_to(root)}:{line}"
        for folder in FOLDERS
        for file in sorted((root / folder).rglob("*.py"))
        if not file.as_posix().endswith(tuple(IN_A_STAGE))
        for line in writes(file.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_nobody_lets_safetensors_write_a_file(root: Path) -> None:
    """It writes another file first, which a kill leaves behind, flushes nothing, and has errors of its own."""
    folders = ("h1export", "graphs", "targets", "validate", "plugins")
    files = [file for folder in folders for file in (root / folder).rglob("*.py")]
    assert [file for file in files if "save_file(" in file.read_text(encoding="utf-8")] == []
