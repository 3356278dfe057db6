"""Every relative link of README.md and docs/ leads to a file or folder of the checkout, and every anchor to a heading."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

FENCE = re.compile(r"^ *(`{3,}|~{3,})[^\n]*\n.*?^ *\1`*~*[ \t]*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(`+)(?!`)(?:(?!\n\n).)*?(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(r"\]\(\s*<?([^\s()<>]+)>?(?:\s+\"[^\"]*\")?\s*\)|^ {0,3}\[[^\]]+\]:\s*<?([^\s<>]+)>?", re.MULTILINE)
EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)  # https:, mailto:
HEADING = re.compile(r"^#{1,6} +(.+?)[ #]*$", re.MULTILINE)


def links(markdown: str) -> Iterator[str]:
    """Targets of inline links, images and reference definitions, outside code."""
    for found in LINK.finditer(CODE.sub("`code`", FENCE.sub("", markdown))):
        yield found[1] or found[2]


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = HEADING.findall(FENCE.sub("", markdown))
    slugs = [
        re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "]", heading).lower()).replace(" ", "-") for heading in headings
    ]
    return {slug if slugs[:i].count(slug) == 0 else f"{slug}-{slugs[:i].count(slug)}" for i, slug in enumerate(slugs)}


def dead(root: Path, file: Path, known: set[Path]) -> Iterator[str]:
    """Relative links of ``file`` that lead to nothing in ``known``, the files that belong to the checkout ``root``."""
    folders = {folder for path in known for folder in path.parents}
    for link in links(file.read_text(encoding="utf-8")):
        if EXTERNAL.match(link):
            continue
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(file.parent / path)) if path else file
        inside = target == root or root in target.parents
        if path.startswith("/") or not inside or not (target in known or target in folders):
            yield f"{file.relative_to(root)}: {link}: no such file"
        elif anchor and (target.suffix != ".md" or anchor not in anchors(target.read_text(encoding="utf-8"))):
            yield f"{file.relative_to(root)}: {link}: no such heading"


def test_relative_links_lead_somewhere(root: Path, own_files: tuple[Path, ...]) -> None:
    texts = [
        file
        for file in own_files
        if file == root / "README.md" or (root / "docs" in file.parents and file.suffix == ".md")
    ]
    found = [link for file in texts for link in dead(root, file, set(own_files))]
    assert len(texts) > 1
    assert not found, "\n".join(found)


def test_every_text_is_in_the_index(root: Path, own_files: tuple[Path, ...]) -> None:
    index = root / "docs" / "README.md"
    linked = {Path(os.path.normpath(index.parent / link)) for link in links(index.read_text(encoding="utf-8"))}
    texts = {file for file in own_files if root / "docs" in file.parents and file.suffix == ".md"}
    assert texts - linked == {index}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """docs/a.md to write into, docs/b.md with headings, core/c.py, and a file that does not belong to it."""
    for name, text in {
        "docs/b.md": "# One word\n## `h1::op` (new)\n# One word\n```\n# no heading\n```\n",
        "core/c.py": "",
        "ignored.md": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def dead_in(checkout: Path, markdown: str) -> list[str]:
    """What is dead in a docs/a.md of ``markdown``."""
    file = checkout / "docs" / "a.md"
    file.write_text(markdown, encoding="utf-8")
    return [
        line.split(": ", 1)[1] for line in dead(checkout, file, {file, checkout / "docs/b.md", checkout / "core/c.py"})
    ]


@pytest.mark.parametrize(
    "link",
    [
        "b.md",
        "../core/c.py",
        "../core",
        "../core/",
        "..",
        "b.md#one-word",
        "b.md#one-word-1",
        "b.md#h1op-new",
        "https://example.org/x",
        "mailto:a@b",
    ],
)
def test_a_live_link_is_fine(checkout: Path, link: str) -> None:
    assert dead_in(checkout, f"see [it]({link}), ![it](<{link}>), [it][1]\n\n[1]: {link}\n") == []


@pytest.mark.parametrize(
    "link",
    [
        "d.md",
        "core/c.py",
        "../ignored.md",
        "../../outside.md",
        "/docs/b.md",
        "b.md/x",
        "b.md#no-heading",
        "b.md#two",
        "../core/c.py#L1",
        "#here",
    ],
)
def test_a_dead_link_is_seen(checkout: Path, link: str) -> None:
    reason = "no such heading" if "#" in link else "no such file"
    for markdown in (f"see [it]({link})", f'a [`c`]({link} "title")', f"![it](<{link}>)", f"[1]: {link}"):
        assert dead_in(checkout, markdown) == [f"{link}: {reason}"], markdown


@pytest.mark.parametrize(
    "markdown",
    ["`[it](d.md)`", "``a ` [it](d.md)``", "```\n[it](d.md)\n```", "~~~md\n[it](d.md)\n~~~", "a[i] = (d.md)"],
)
def test_code_is_no_link(checkout: Path, markdown: str) -> None:
    assert dead_in(checkout, f"before\n\n{markdown}\n\nafter") == []
    assert dead_in(checkout, f"a lone ` first\n\n{markdown}\n\n[it](d.md)") == ["d.md: no such file"]


def test_an_anchor_of_the_text_itself(checkout: Path) -> None:
    assert dead_in(checkout, "# Here\n[up](#here)") == []
