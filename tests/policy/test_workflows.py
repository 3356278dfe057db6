"""Workflows name only what exists: sessions of the noxfile, options of the command line, declared inputs."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from h1export.cli import cli

INPUT = re.compile(r"\$\{\{[^}]*?\binputs\.([\w-]+)")


@pytest.fixture(scope="module")
def workflow(root: Path) -> Mapping[Any, Any]:
    return dict(yaml.safe_load((root / ".github/workflows/checks.yml").read_text(encoding="utf-8")))


def sessions(noxfile: str) -> set[str]:
    """Names of a noxfile's sessions; one with several Pythons is several: tests-3.11."""
    tree = ast.parse(noxfile)
    found = set()
    for node in tree.body:
        marks = [ast.unparse(mark) for mark in node.decorator_list] if isinstance(node, ast.FunctionDef) else []
        if isinstance(node, ast.FunctionDef) and any(mark.startswith("nox.session") for mark in marks):
            several = any("python=PYTHONS" in mark for mark in marks)
            found |= {f"{node.name}-{version}" for version in pythons(tree)} if several else {node.name}
    return found


def pythons(tree: ast.Module) -> tuple[str, ...]:
    """The literal PYTHONS."""
    (value,) = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PYTHONS"
    ]
    return tuple(ast.literal_eval(value))


def test_the_matrix_names_sessions_that_exist(workflow: Mapping[Any, Any], root: Path) -> None:
    noxfile = (root / "noxfile.py").read_text(encoding="utf-8")
    rows = workflow["jobs"]["matrix"]["strategy"]["matrix"]["include"]
    named = [row["session"] for row in rows]
    assert set(named) <= sessions(noxfile)
    assert {name for name in sessions(noxfile) if name.startswith("tests-")} | {"lint", "types", "build"} <= set(named)
    assert all(
        row["session"].removeprefix("tests-") == row["python"] for row in rows if row["session"].startswith("tests-")
    )


def test_sessions_are_read_from_a_noxfile() -> None:
    plain = "@nox.session\ndef a(s): ...\n"
    several = "@nox.session(python=PYTHONS)\ndef b(s): ...\ndef c(s): ...\n"
    source = f"PYTHONS = ('3.1', '3.2')\n{plain}{several}"
    assert sessions(source) == {"a", "b-3.1", "b-3.2"}


def test_inputs_are_declared_and_used(workflow: Mapping[Any, Any], root: Path) -> None:
    declared = workflow[True]["workflow_call"]["inputs"]  # YAML 1.1 reads `on` as true
    text = (root / ".github/workflows/checks.yml").read_text(encoding="utf-8")
    conditions = re.findall(r"if: inputs\.([\w-]+)", text)
    assert {*INPUT.findall(text), *conditions} == set(declared)
    assert all(job["timeout-minutes"] <= 60 for job in workflow["jobs"].values())


def steps(workflow: Mapping[Any, Any]) -> list[Mapping[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_commands_and_their_options_exist(workflow: Mapping[Any, Any]) -> None:
    lines = [shlex.split(step["run"]) for step in steps(workflow) if step.get("run", "").startswith("h1export")]
    assert [words[1] for words in lines] == ["build", "gate"]
    for words in lines:
        assert isinstance(cli, click.Group)
        command = cli.commands[words[1]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known


def test_no_input_is_pasted_into_a_shell(workflow: Mapping[Any, Any]) -> None:
    """What a caller gives reaches shells through variables; within ${{ }} it could close a quote and run."""
    assert [step["run"] for step in steps(workflow) if INPUT.search(step.get("run", ""))] == []


def test_the_example_of_the_docs_calls_it_with_inputs_that_exist(workflow: Mapping[Any, Any], root: Path) -> None:
    text = (root / "docs/gates.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (job,) = yaml.safe_load(example)["jobs"].values()
    assert job["uses"].split("@")[0].endswith("/.github/workflows/checks.yml")
    assert set(job["with"]) <= set(workflow[True]["workflow_call"]["inputs"])
    assert {"repository", "gates"} <= set(job["with"])
