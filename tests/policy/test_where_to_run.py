"""docs/where-to-run.md names every runtime that this tree has, and nothing that it has not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from markdown_it import MarkdownIt

from h1export.targets import target_infos
from h1export.targets.onnxruntime.options import Graph

MARKDOWN = MarkdownIt("commonmark").enable("table")
RAN = ("ran", "built", "read", "not run")  # what the last column of the table begins with


@pytest.fixture(scope="module")
def text(root: Path) -> str:
    return (root / "docs" / "where-to-run.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows(text: str) -> list[list[str]]:
    """The cells of the decision table, without its heading."""
    (table,) = re.findall(r"<!-- where -->\n(.*?)<!-- end -->", text, re.DOTALL)
    cells = [token.content for token in MARKDOWN.parse(table) if token.type == "inline"]
    return [cells[start : start + 4] for start in range(4, len(cells), 4)]


def commands(text: str) -> str:
    return "\n".join(token.content for token in MARKDOWN.parse(text) if token.type == "fence" and token.info == "bash")


def test_every_target_has_a_row_and_a_start(text: str, rows: list[list[str]]) -> None:
    for built in (*(f"--target {name}" for name in target_infos()), *(f"--graph {name}" for name in get_args(Graph))):
        if built != "--graph cpu":  # the default
            assert any(re.search(rf"{built}\b", row[2]) for row in rows), built
            assert re.search(rf"build .*{built}\b", commands(text)), built


def test_every_target_and_graph_exists(text: str) -> None:
    assert set(re.findall(r"--target (\w+)", text)) == set(target_infos())
    assert set(re.findall(r"--graph (\w+)", text)) <= set(get_args(Graph))


def test_every_other_runtime_has_a_start(text: str) -> None:
    for info in target_infos().values():
        for name in info.other_runtimes:
            assert f"--kernels {name}" in commands(text)
    others = {name for info in target_infos().values() for name in info.other_runtimes}
    assert set(re.findall(r"--kernels (\w+)", text)) <= others


def test_extras_exist(text: str, project: Mapping[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    found = {name for names in re.findall(r"h1export\[([\w,]+)\]", text) for name in names.split(",")}
    assert found <= set(extras)
    assert {info.extra for info in target_infos().values() if extras[info.extra]} <= found


def test_every_row_says_what_was_run(rows: list[list[str]]) -> None:
    assert len(rows) > len(target_infos())
    for row in rows:
        assert row[3].startswith(RAN), row
        if "GPU" in row[0] and row[0].startswith("NVIDIA"):
            assert "never ran on a GPU" in row[3] or row[3] == "read", row


def test_a_folder_is_built_before_it_is_used(text: str) -> None:
    """In the order of the page: what a command reads is what one before it wrote."""
    made: set[str] = set()
    for line in commands(text).splitlines():
        words = line.split("#")[0]
        used = set(re.findall(r"(?<![\w-])falcon-(?!h1)\w+(?:-part)?", words))
        made |= set(re.findall(r"--out (falcon-[\w-]+)", words))
        assert used <= made, line
