"""An artifact runs where no package of an extra but ort is installed; what needs another says how to get it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from h1export.artifact.artifact import Artifact
from h1export.commands.generate import generate_text
from h1export.errors import EXTRAS
from h1export.runtime.generation import Sampling

pytestmark = pytest.mark.ort

Build = Callable[..., Artifact]
PROMPT, TOKENS = "def main():", 8
HIDDEN = f"""
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {tuple(EXTRAS)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
"""


def without_extras(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process that cannot import EXTRAS."""
    return subprocess.run(
        [sys.executable, "-c", HIDDEN + code, *arguments], capture_output=True, text=True, check=False
    )


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run h1export in such a process."""
    return without_extras("from h1export.cli import main; main()", *arguments)


def test_generate_and_inspect(tiny: Path, build: Build) -> None:
    artifact = build(tiny, "int4")
    found = command("generate", str(artifact.folder), PROMPT, "--max-tokens", str(TOKENS))
    text = "".join(generate_text(artifact.folder, PROMPT, TOKENS, sampling=Sampling()))
    assert (found.stdout.rstrip("\n"), found.stderr, found.returncode) == (text.rstrip("\n"), "", 0)
    found = command("inspect", str(artifact.folder), "--json")
    assert (found.stderr, found.returncode) == ("", 0)


@pytest.mark.parametrize("line", ["build --target ort", "build --target ort --quant none", "validate OUT", "trace"])
def test_a_command_that_needs_them_says_so_in_one_line(line: str, tiny: Path, build: Build, tmp_path: Path) -> None:
    words = line.replace("OUT", str(build(tiny, "int4").folder)).split()
    found = command(*words, *(["--out", str(tmp_path / "out")] if words[0] == "build" else []))
    assert list(tmp_path.iterdir()) == []
    assert found.returncode == 2
    assert len(found.stderr.splitlines()) == 1
    assert "is not installed" in found.stderr
    assert found.stderr.endswith("pip install 'h1export[export]'\n")


def test_signatures_need_an_extra_of_their_own(tiny: Path, build: Build, tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_text("a key")
    found = command("verify", str(build(tiny, "int4").folder), "--key", str(key))
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.endswith("is not installed, and signatures need it; pip install 'h1export[sign]'\n")


def test_so_does_python() -> None:
    found = without_extras(
        "import h1export\nfrom h1export.errors import H1ExportError\n"
        "try:\n    h1export.hf\nexcept H1ExportError as error:\n    print(error)"
    )
    assert found.stdout.endswith("pip install 'h1export[export]'\n"), found.stderr
