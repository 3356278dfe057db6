"""`h1export trace`: the program after any pass, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from h1export.cli import run
from h1export.graphs.passes import passes_for

NAMES = [rewrite.name for rewrite in passes_for(lambda _: "")]


def test_the_program_after_all_passes(make_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_checkpoint("everything")
    assert run(["trace", str(checkpoint)]) == 0
    text = capsys.readouterr().out
    assert "neg(exp(model.layers.0.mamba.A_log))" in text
    assert "aten._assert_tensor_metadata" not in text
    assert "model.layers.1.mamba.A_log" not in text
    assert [line.split()[0] for line in text.splitlines()[-len(NAMES) :]] == NAMES


@pytest.mark.parametrize(
    ("after", "count", "asserts", "folded"),
    [("none", 0, True, False), ("fold_decay", 2, False, True)],
)
def test_the_program_after_one_pass(
    after: str,
    count: int,
    asserts: bool,
    folded: bool,
    make_checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["trace", str(make_checkpoint("everything")), "--after", after, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [rewrites["name"] for rewrites in found["rewrites"]] == NAMES[:count]
    assert any("_assert_tensor_metadata" in node["definition"] for node in found["nodes"]) == asserts
    definitions = {weight["name"]: weight["definition"] for weight in found["weights"]}
    assert definitions["p_model_layers_1_mamba_a_log"].startswith("neg(exp(" if folded else "model.")
    assert len(found["constants"]) == 2  # the µP vectors of two layers are folded by a later pass
    assert {entry["layer"] for entry in found["inputs"]} == {None, 0, 1}


def test_weights_need_not_be_there(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((make_checkpoint("plain") / "config.json").read_bytes())
    assert run(["trace", str(tmp_path), "--quiet"]) == 0


def test_an_unknown_pass_is_named_with_those_that_there_are(
    make_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["trace", str(make_checkpoint("plain")), "--after", "fold_all"]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err == f"h1export: --after: 'fold_all' is not a pass; give one of {', '.join(['none', *NAMES])}\n"
