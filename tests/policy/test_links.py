"""Relative links lead to files, anchors to headings, and a name in a link is defined in the linked file.

markdown-it-py, a requirement of rich, parses the texts. The link checkers on PyPI are not used: they read the folder
instead of what git tracks, so a link to an ignored file would pass, and they do not look for the names.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)  # https:, mailto:
# of a class, a method or a constant: WeightStore, Target.lower, CARRIED
NAME = re.compile(r"[A-Z]\w*[a-z0-9][A-Z]\w*|[A-Z]\w*\.\w+|[A-Z][A-Z_]{3,}")
MARKDOWN = MarkdownIt("commonmark").enable("table")


def shown(tokens: list[Token]) -> str:
    """The text of inline tokens, without its markup."""
    return "".join(token.content for token in tokens if token.type in ("text", "code_inline"))


def links(markdown: str) -> Iterator[tuple[str, str]]:
    """(target, text) of every link and image outside code."""
    for token in MARKDOWN.parse(markdown):
        children = token.children or []
        for start, child in enumerate(children):
            if child.type == "image":
                yield str(child.attrs["src"]), child.content
            elif child.type == "link_open":
                end = next(i for i in range(start, len(children)) if children[i].type == "link_close")
                yield str(child.attrs["href"]), shown(children[start:end])


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    tokens = MARKDOWN.parse(markdown)
    headings = [shown(after.children or []) for at, after in pairwise(tokens) if at.type == "heading_open"]
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return {slug if slugs[:i].count(slug) == 0 else f"{slug}-{slugs[:i].count(slug)}" for i, slug in enumerate(slugs)}


def dead(root: Path, file: Path, known: set[Path]) -> Iterator[str]:
    """Relative links of ``file`` that lead to nothing in ``known``, the files that belong to the checkout ``root``."""
    folders = {folder for path in known for folder in path.parents if root in (folder, *folder.parents)}
    for link, text in links(file.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(file.parent / path)) if path else file
        if EXTERNAL.match(link):
            continue
        if path.startswith("/") or target not in known | folders:
            yield f"{file.relative_to(root)}: {link}: no such file"
        elif anchor and (target.suffix != ".md" or anchor not in anchors(target.read_text(encoding="utf-8"))):
            yield f"{file.relative_to(root)}: {link}: no such heading"
        elif target.suffix == ".py" and NAME.fullmatch(text):
            name = text.split(".")[-1]
            if not re.search(rf"\b(class|def) {name}\b|^{name}\b", target.read_text(encoding="utf-8"), re.MULTILINE):
                yield f"{file.relative_to(root)}: {link}: no {text} there"


def test_relative_links_lead_somewhere(root: Path, own_files: tuple[Path, ...]) -> None:
    texts = [
        file for file in own_files if file.suffix == ".md" and file.parent in (root, root / "docs", root / "docs/notes")
    ]
    found = [link for file in texts for link in dead(root, file, set(own_files))]
    assert {root / "README.md", root / "CONTRIBUTING.md", root / "docs/README.md"} < set(texts)
    assert not found, "\n".join(found)


def test_every_text_is_in_the_index(root: Path, own_files: tuple[Path, ...]) -> None:
    index = root / "docs" / "README.md"
    linked = {Path(os.path.normpath(index.parent / link)) for link, _ in links(index.read_text(encoding="utf-8"))}
    texts = {file for file in own_files if root / "docs" in file.parents and file.suffix == ".md"}
    assert texts - linked == {index}


LIVE = ("b.md", "../core/c.py", "../core", "..", "b.md#one-word-1", "b.md#h1op-new", "https://example.org/x", "#here")
DEAD = {
    "d.md": "no such file",
    "../ignored.md": "no such file",
    "../../outside.md": "no such file",
    "/docs/b.md": "no such file",
    "b.md#two": "no such heading",
    "../core/c.py#L1": "no such heading",
}


def dead_in(checkout: Path, markdown: str) -> list[str]:
    """What is dead in a docs/a.md of ``markdown``, in a checkout with docs/b.md, core/c.py and an ignored file."""
    texts = {
        "docs/a.md": markdown,
        "docs/b.md": "# One word\n## `h1::op` (new)\n# One word\n",
        "core/c.py": "class WeightStore: ...\n",
    }
    for name, text in {**texts, "ignored.md": ""}.items():
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_text(text, encoding="utf-8")
    return [
        line.split(": ", 1)[1] for line in dead(checkout, checkout / "docs/a.md", {checkout / name for name in texts})
    ]


@pytest.mark.parametrize("link", LIVE)
def test_a_live_link_is_fine(tmp_path: Path, link: str) -> None:
    assert dead_in(tmp_path, f"# Here\n[it]({link}), ![it](<{link}>), [it][1]\n\n[1]: {link}\n") == []


@pytest.mark.parametrize("link", DEAD)
def test_a_dead_link_is_seen(tmp_path: Path, link: str) -> None:
    for markdown in (f"see [it]({link})", f'a [`c`]({link} "title")', f"![it](<{link}>)", f"[1]\n\n[1]: {link}"):
        assert dead_in(tmp_path, markdown) == [f"{link}: {DEAD[link]}"], markdown


def test_a_name_that_is_not_in_the_linked_file_is_seen(tmp_path: Path) -> None:
    assert dead_in(tmp_path, "[WeightStore](../core/c.py)") == []
    assert dead_in(tmp_path, "[WeightReader](../core/c.py)") == ["../core/c.py: no WeightReader there"]


@pytest.mark.parametrize("code", ["`[it](d.md)`", "```\n[it](d.md)\n```", "~~~md\n[it](d.md)\n~~~", "a[i] = (d.md)"])
def test_code_is_no_link(tmp_path: Path, code: str) -> None:
    assert dead_in(tmp_path, f"a lone ` first\n\n{code}\n\n[it](d.md)") == ["d.md: no such file"]
