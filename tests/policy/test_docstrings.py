"""What the product offers is documented where it is declared.

Not asked for: functions of up to four lines, whose name and types say it all; methods that a base class declares, ours or
torch's; and the class of a module with only that one, such as a pass, where the module's docstring speaks.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

import pytest

SHORT = 4
OF_TORCH = {"forward"}  # of torch.nn.Module
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(body: list[ast.stmt]) -> list[Definition]:
    """Definitions without a leading underscore."""
    return [node for node in body if isinstance(node, Definition) and not node.name.startswith("_")]


def declared_by_bases(trees: Mapping[str, ast.Module]) -> set[str]:
    """Method names that a Protocol or an ABC of ours declares."""
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    bases = [node for node in classes if {"Protocol", "ABC"} & {ast.unparse(base).split("[")[0] for base in node.bases}]
    return {method.name for base in bases for method in public(base.body)}


def undocumented(tree: ast.Module, inherited: set[str]) -> Iterator[str]:
    """Public definitions of a module that owe a docstring, as name or Class.name."""
    top = public(tree.body)
    for node in top:
        alone = isinstance(node, ast.ClassDef) and len(top) == 1 and ast.get_docstring(tree)
        if not alone and owes(node):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (
                f"{node.name}.{item.name}" for item in public(node.body) if item.name not in inherited and owes(item)
            )


def owes(node: Definition) -> bool:
    """Whether a definition has no docstring and is not short."""
    short = not isinstance(node, ast.ClassDef) and (node.end_lineno or node.lineno) - node.lineno < SHORT
    return not short and ast.get_docstring(node) is None


def test_public_names_are_documented(trees: Mapping[str, ast.Module]) -> None:
    inherited = declared_by_bases(trees) | OF_TORCH
    found = [f"{module}.{name}" for module, tree in trees.items() for name in undocumented(tree, inherited)]
    assert not found, "\n".join(found)


def test_modules_are_documented(trees: Mapping[str, ast.Module]) -> None:
    assert [module for module, tree in trees.items() if ast.get_docstring(tree) is None] == []


LONG_BODY = "\n".join(["    x = 1"] * SHORT)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (f"def f():\n{LONG_BODY}", ["f"]),
        (f"async def f():\n{LONG_BODY}", ["f"]),
        (f"def f():\n    'It does.'\n{LONG_BODY}", []),
        (f"def _f():\n{LONG_BODY}", []),
        ("def f():\n    return 1", []),
        ("class A:\n    x = 1", ["A"]),
        ("'''Module.'''\nclass A:\n    x = 1", []),
        ("'''Module.'''\nclass A:\n    x = 1\nclass B:\n    'Doc.'", ["A"]),
        (f"class A:\n  'Doc.'\n  def step(self):\n{LONG_BODY}\n  def walk(self):\n{LONG_BODY}", ["A.walk"]),
        (f"class _A:\n  def walk(self):\n{LONG_BODY}", []),
    ],
)
def test_what_owes_a_docstring(source: str, expected: list[str]) -> None:
    assert list(undocumented(ast.parse(source), {"step"})) == expected


def test_protocols_declare_for_those_who_implement_them() -> None:
    source = "class P(Protocol, Generic[T]):\n    def step(self): ...\nclass Q:\n    def walk(self): ..."
    assert declared_by_bases({"m": ast.parse(source)}) == {"step"}
