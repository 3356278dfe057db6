"""Sweeps: their file, their cells, what is finished, and the whole command without Ray."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from h1export.artifact.artifact import Artifact
from h1export.cli import run
from h1export.commands import sweep as module
from h1export.commands.sweep import Cell, Sweep, cells, finished, run_cell
from h1export.errors import H1ExportError
from h1export.report.swept import Swept

QUICK: dict[str, Any] = {"text_bytes": 600, "prompts": 0}


def form(**keys: Any) -> dict[str, Any]:
    return {"checkpoints": {"one": "model"}, "targets": ["ort"], "methods": ["rtn"], "validate": QUICK} | keys


def written(folder: Path, **keys: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(form(**keys), sort_keys=False))
    return path


@pytest.fixture
def base(spoken_checkpoint: Path, tmp_path: Path) -> Path:
    """A folder with a small checkpoint named model."""
    (tmp_path / "model").symlink_to(spoken_checkpoint)
    return tmp_path


def cells_of(folder: Path, **keys: Any) -> list[Cell]:
    return cells(Sweep.read(written(folder, **keys)), folder)


def test_cells_are_all_combinations_that_differ(base: Path) -> None:
    """Methods and group sizes are those of int4; names of cells tell them apart."""
    found = cells_of(
        base,
        checkpoints={"one": "model", "two": None},
        targets=["ort", "gguf"],
        precisions=["int4", "int8", "none", "int4"],
        methods=["rtn", "search"],
        group_sizes=[32, 64],
        options={"ort": {"accuracy_level": 4}},
    )
    assert len(found) == len({cell.name for cell in found}) == len({cell.key for cell in found}) == 2 * 2 * (4 + 1 + 1)
    assert {cell.name.rpartition("-")[0] for cell in found if cell.checkpoint == "one" and cell.target == "ort"} == {
        *(f"one-ort-int4-{method}-g{group}" for method in ("rtn", "search") for group in (32, 64)),
        "one-ort-int8",
        "one-ort-none",
    }
    assert {cell.model for cell in found} == {str(base / "model"), None}
    assert {getattr(cell.options, "accuracy_level", None) for cell in found} == {4, None}


@pytest.mark.parametrize(
    "keys",
    [
        {"validate": {**QUICK, "text_bytes": 500}},
        {"speed": {"repeats": 1}},
        {"options": {"ort": {"accuracy_level": 0}}},
        {"calibration": {"seed": 1}},
        {"tasks": {"names": ["x"]}},
    ],
    ids=["validate", "speed", "options", "calibration", "tasks"],
)
def test_what_decides_figures_decides_the_key(keys: dict[str, Any], base: Path) -> None:
    (before,) = cells_of(base)
    assert cells_of(base)[0] == before
    assert cells_of(base, **keys)[0].key != before.key
    assert cells_of(base, cpus=3)[0].key == before.key


def test_another_checkpoint_in_the_folder_is_another_cell(base: Path, copy_checkpoint: Callable[..., Path]) -> None:
    (base / "model").unlink()
    folder = copy_checkpoint()
    (base / "model").symlink_to(folder)
    (before,) = cells_of(base)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert cells_of(base)[0].key != before.key


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"targets": []}, "length >= 1"),
        ({"targets": ["x"]}, "'x' is unknown"),
        ({"precisions": ["int3"]}, "Invalid enum value"),
        ({"methods": ["best"]}, "'best' is unknown"),
        ({"group_sizes": [33]}, "33 is not a group size"),
        ({"checkpoints": {}}, "length >= 1"),
        ({"checkpoints": {"a/b": "model"}}, "matching regex"),
        ({"options": {"gguf": {}}}, "none of the targets"),
        ({"options": {"ort": {"accuracy": 4}}}, "'accuracy' is unknown"),
        ({"options": {"ort": {"accuracy_level": "4"}}}, "cannot be"),
        ({"validate": {"text": "none.txt"}}, "does not exist"),
        ({"calibration": {"file": "none.txt"}}, "does not exist"),
        ({"tasks": {"names": ["x"], "include": "none"}}, "does not exist"),
        ({"target": ["ort"]}, "unknown key at \\$.target"),
        ({"speed": {"repeats": 0}}, ">= 1"),
    ],
    ids=str,
)
def test_a_wrong_file_is_one_line(keys: dict[str, Any], message: str, base: Path) -> None:
    with pytest.raises(H1ExportError, match=message) as caught:
        cells_of(base, **keys)
    assert "\n" not in str(caught.value)


@pytest.mark.ort
def test_what_is_finished_is_not_done_again(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends between two steps goes on with the next one; a changed artifact is made again."""
    (cell,) = cells_of(base, speed={"repeats": 1, "prefill": 8})
    done: list[str] = []

    def counted(name: str, ends: bool = False) -> None:
        whole: Callable[..., Any] = getattr(module, name)

        def call(*arguments: Any, **others: Any) -> Any:
            done.append(name)
            if ends:
                raise KeyboardInterrupt
            return whole(*arguments, **others)

        monkeypatch.setattr(module, name, call)

    def fake_speeds(*_: Any) -> tuple[dict[str, float], str]:
        return {"decode": 7.0}, ""

    monkeypatch.setattr(module, "_speeds", fake_speeds)
    for name in ("build_artifact", "validate_artifact"):
        counted(name)
    with monkeypatch.context() as patch:
        patch.setattr(module, "validate_artifact", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_cell(cell, base, None)
    assert done == ["build_artifact"]
    assert finished(cell, base) is None
    found = run_cell(cell, base, None)
    assert done == ["build_artifact", "validate_artifact"]
    assert (found.error, found.passed, found.figures["decode"]) == ("", True, 7.0)
    assert 0 < found.figures["kl"] < 1
    assert run_cell(cell, base, None) == found == finished(cell, base) == Swept.read(base / f"{cell.name}.json")
    assert done == ["build_artifact", "validate_artifact"]
    assert found.identity == Artifact.open(base / cell.name).identity
    (base / cell.name / "model.onnx").unlink()
    assert finished(cell, base) is None


@pytest.mark.ort
def test_the_command(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One cell passes, with speeds and scores; one cannot run, and says why; a second run does neither again."""
    from h1export.integrations import sweep_scores

    def scores(cell: Cell, out: Path) -> Mapping[str, float]:
        assert Artifact.open(out)
        return {"task acc": 0.5}

    monkeypatch.setattr(sweep_scores, "task_scores", scores)
    path = written(
        base,
        checkpoints={"one": "model", "none": "<b>nothing</b>"},
        speed={"repeats": 1, "prefill": 8},
        tasks={"names": ["task"]},
    )
    words = ["sweep", str(path), "--out", str(base / "out"), "--in-process", "--json"]
    assert run(words) == 1
    one, none = json.loads(capsys.readouterr().out)["cells"]
    assert (one["passed"], one["best"], one["tasks"]) == (True, True, {"task acc": 0.5})
    assert one["figures"].keys() == {"kl", "bits_per_byte", "decode", "prefill"}
    assert min(one["figures"].values()) > 0
    assert (none["passed"], none["best"]) == (False, False)
    assert "no such folder" in none["error"]
    page = (base / "out" / "sweep.html").read_text()
    assert f'<data value="{one["figures"]["kl"]}">' in page
    assert "<b>nothing" not in page
    assert "<svg" in page
    monkeypatch.setattr(module, "build_artifact", None)
    assert run(words) == 1
    assert json.loads(capsys.readouterr().out)["cells"] == [one, none]


def test_what_is_missing_is_said(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    command = sys.modules["h1export.cli.sweep"]
    path = str(written(base))
    for package, extra in {"matplotlib": "report", "ray": "ray"}.items():
        monkeypatch.setattr(command, "find_spec", lambda name, package=package: None if name == package else "there")
        assert run(["sweep", path, "--out", str(base / "out")]) == 2
        assert f"pip install 'h1export[{extra}]'" in capsys.readouterr().err
    assert run(["sweep", path, "--address", "x", "--in-process"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert run(["sweep", str(base / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
