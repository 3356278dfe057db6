"""The pytest plugin, run by pytest on small repositories that gate an export."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from h1export.artifact.artifact import Artifact, file_table
from h1export.errors import H1ExportError
from h1export.integrations.pytest_comparison import Exported, Tolerance, Truth, difference

pytest_plugins = ["pytester"]

Build = Callable[..., Artifact]

GATE = """
def test_export(h1_artifact, h1_reference, assert_logits_close):
    ids = h1_artifact.ids("def main(argv):")
    assert_logits_close(h1_artifact.logits(ids), h1_reference.logits(ids), ids)
"""
EXACT = """
def test_lowering(h1_artifact, h1_reference, assert_logits_close):
    ids, exact = h1_artifact.ids("def main(argv):"), h1_artifact.exact
    assert exact.tolerance.metric == "stored.logits"
    assert h1_artifact.tolerance.metric == "drift.logits"
    assert_logits_close(exact.logits(ids), h1_reference.logits(ids), ids, exact.tolerance.value)
"""


@pytest.fixture(scope="module")
def int4(tiny: Path, build: Build) -> Path:
    """With activations rounded to int8, as builds are by default."""
    return build(tiny, "int4", accuracy_level=4).folder


@pytest.fixture(scope="module")
def other(make_checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint that no artifact here was built from."""
    return make_checkpoint()


@pytest.fixture(scope="module", autouse=True)
def loaded(tiny: Path, int4: Path, other: Path) -> None:
    """Import everything before: pytester forgets modules first imported while it runs, and torch imports only once."""
    exported = Exported.open(int4)
    ids = exported.ids("x")
    assert exported.exact.logits(ids).shape == Truth(tiny, exported).logits(ids).shape


@pytest.fixture(autouse=True)
def compiled_kernels(loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """pytester moves the home directory, and the cache of compiled kernels lies there."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser()))


@pytest.fixture
def wrong(tiny: Path, build: Build, tmp_path: Path) -> Path:
    """A float32 artifact whose head has one wrong row, and hashes that say it was built so."""
    folder = Path(shutil.copytree(build(tiny).folder, tmp_path / "wrong"))
    head: Any = ir.load(folder / "model.onnx").graph.initializers["lm_head.weight"].const_value
    weights = np.memmap(folder / "model.onnx.data", np.float32, "r+", head.offset, tuple(head.shape.numpy()))
    rows = weights if head.shape[0] == 4096 else weights.T
    rows[612] *= -1
    weights.flush()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: found for name, found in file_table(folder).items() if name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_three_lines_gate_an_export(int4: Path, pytester: pytest.Pytester) -> None:
    pytester.makeini(f"[pytest]\nh1_artifact = {int4}")
    pytester.makepyfile(GATE + EXACT)
    pytester.runpytest_inprocess().assert_outcomes(passed=2)


def test_a_wrong_artifact_fails_and_says_where(wrong: Path, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(GATE)
    result = pytester.runpytest_inprocess("--h1-artifact", str(wrong))
    result.assert_outcomes(failed=1)
    result.stdout.re_match_lines_random(
        [
            r"E +AssertionError: logits are 0\.\d+ of the range \d+\.\d+ from the reference; "
            r"tolerance source\.logits is 5e-05: FAIL",
            r"E +beyond it: \d+ of \d+ positions, from position \d+ after token \d+ '.*'",
            r"E +worst: position \d+ after token \d+ '.*', "
            r"logit of token 612 '.*': -?\d.*, and the reference says -?\d.*",
            r"E +likeliest token the same at \d+\.\d% of positions, KL divergence .* nats",
        ]
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "*h1export: no artifact; give --h1-artifact FOLDER*"),
        (("--h1-artifact", "nowhere"), "*h1export: nowhere: no manifest.json;*"),
    ],
)
def test_what_is_missing_is_said_in_one_line(arguments: tuple[str, ...], says: str, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(GATE)
    result = pytester.runpytest_inprocess(*arguments)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([says])
    assert "Traceback" not in result.stdout.str()


def test_another_checkpoint_is_refused(int4: Path, other: Path, pytester: pytest.Pytester) -> None:
    Path(pytester.path / "checkpoint").symlink_to(other)
    pytester.makeini(f"[pytest]\nh1_artifact = {int4}\nh1_checkpoint = checkpoint")
    pytester.makepyfile(GATE)
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*h1export: {int4}: was not built from {pytester.path / 'checkpoint'};*"])


TRUTH = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


def test_a_difference_is_named() -> None:
    found = TRUTH.copy()
    found[1, 2] += 0.5
    found[2, 0] += 0.1
    allowed = Tolerance(0.01, "x")
    text = difference(found, TRUTH, allowed, tokenizer=None, ids=None)
    assert "0.25 of the range 2 from" in text
    assert "2 of 3 positions, from position 1" in text
    assert "worst: position 1, logit of token 2: " in text
    assert difference(found, TRUTH, Tolerance(0.3, "x"), tokenizer=None, ids=None) == ""
    found[0, 0] = np.nan
    assert "from position 0" in difference(found, TRUTH, Tolerance(9, "x"), tokenizer=None, ids=None)
    with pytest.raises(H1ExportError, match="same ids"):
        difference(found[1:], TRUTH, allowed, tokenizer=None, ids=None)
    with pytest.raises(H1ExportError, match="2 ids"):
        difference(found, TRUTH, allowed, tokenizer=None, ids=np.arange(2))


def test_changed_files_are_refused(wrong: Path) -> None:
    with (wrong / "model.onnx.data").open("r+b") as stream:
        stream.write(b"\1\2\3\4")
    with pytest.raises(H1ExportError, match="was changed after the build"):
        Exported.open(wrong)


def test_the_plugin_loads_nothing_heavy(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import sys\ndef test_it():\n    assert {'numpy', 'torch', 'h1export.model'}.isdisjoint(sys.modules)"
    )
    pytester.run(sys.executable, "-m", "pytest", "-p", "no:hypothesispytest").assert_outcomes(passed=1)
