"""The examples in JavaScript, with their packages installed as the lock file says."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

INSTALL = "install Node.js 20 or newer with npm (on Debian, apt-get install nodejs npm)"
SECONDS = 300  # npm's registry may be slow


def program(name: str) -> str:
    """Return the path of node or npm."""
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"no {name} here: {INSTALL}")
    return found


@pytest.fixture(scope="session")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of examples/ with its packages; scripts find them there."""
    folder = tmp_path_factory.mktemp("javascript") / "examples"
    source = Path(__file__).parents[2] / "examples"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("node_modules"))
    done = subprocess.run([program("npm"), "ci"], cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    assert not done.returncode, done.stderr
    return folder


@pytest.fixture(scope="session")
def node(javascript: Path) -> Callable[..., str]:
    """node("node/generate.mjs", argument, ..., given=text) -> the standard output of a script in examples/."""

    def run(script: str | Path, *arguments: object, given: str = "") -> str:
        done = subprocess.run(
            [program("node"), str(script), *map(str, arguments)],
            cwd=javascript,
            input=given,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert not done.returncode, done.stderr[-2000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def asked(javascript: Path, node: Callable[..., str]) -> Callable[[list[dict[str, Any]]], list[Any]]:
    """asked([{"folder": ..., "task": ..., ...}, ...]) -> the answers of transformers.js, by transformers_js.mjs."""
    script = shutil.copy(Path(__file__).with_name("transformers_js.mjs"), javascript)

    def ask(jobs: list[dict[str, Any]]) -> list[Any]:
        answers: list[Any] = json.loads(node(script, given=json.dumps(jobs)))
        return answers

    return ask
