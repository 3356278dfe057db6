"""An option of `build` reaches every target that has it, or is an error."""

from __future__ import annotations

from typing import Any

import pytest

from h1export.cli import build as build_command
from h1export.cli import run
from h1export.cli.target_options import target_flags
from h1export.errors import H1ExportError
from h1export.targets import TargetOptions, options_class, target_infos
from h1export.targets.coreml.options import CoreMLOptions
from h1export.targets.onnxruntime.options import OrtOptions
from h1export.targets.options import option_fields
from h1export.targets.tensorrt.options import TensorRTOptions


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--target", "coreml", "--graph", "portable"],
            "--graph: is not an option of --target coreml; leave it out; it is for ort",
        ),
        (["--target", "ort", "--sm", "89"], "--sm: is not an option of --target ort; leave it out; it is for trt"),
        (
            ["--target", "ort", "--max-context", "2048"],
            "--max-context: is not an option of --target ort; leave it out; it is for coreml, trt",
        ),
        (
            ["--target", "trt", "--target", "coreml", "--graph", "cpu"],
            "--graph: is not an option of --target trt, coreml",
        ),
        (
            ["--target", "coreml", "--compute", "bf16"],
            "--compute: cannot be 'bf16' for --target coreml; give fp16 or fp32",
        ),
        (
            ["--target", "trt", "--target", "coreml", "--compute", "bf16"],
            "--compute: cannot be 'bf16' for --target coreml; give fp16 or fp32",
        ),
        (["--target", "trt", "--compute", "fp32"], "--compute: cannot be 'fp32' for --target trt; give fp16 or bf16"),
        (
            ["--target", "ort", "--graph", "cuda", "--accuracy-level", "4"],
            "--accuracy-level: 4 is not a level that the kernels of --graph cuda have; one of 0",
        ),
    ],
)
@pytest.mark.parametrize("command", ["build", "plan"])
def test_a_switch_that_no_target_reads(
    command: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> dict[str, TargetOptions]:
    """Target -> the options that `build` builds it with; nothing is built."""
    found: dict[str, TargetOptions] = {}

    def build(checkpoint: object, target: str, out: object, *, options: TargetOptions, **others: Any) -> None:
        found[target] = options
        raise H1ExportError("here", "the build begins", "continue")

    monkeypatch.setattr("h1export.commands.build.build_artifact", build)
    return found


def test_switches_that_one_of_the_targets_reads(
    chosen: dict[str, TargetOptions], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--accuracy-level", "0", "--max-context", "96", "--sm", "89", "--sm", "90", "--logits", "last", "--quiet"]
    for targets in (["ort", "trt"], ["trt", "ort"]):
        assert run(["build", *(word for name in targets for word in ("--target", name)), *words]) == 2
        assert "the build begins" in capsys.readouterr().err
    assert chosen == {
        "ort": OrtOptions(accuracy_level=0, logits="last"),
        "trt": TensorRTOptions(max_context=96, architectures=(89, 90), logits="last"),
    }


@pytest.mark.parametrize(("graph", "level"), [("cpu", 4), ("cuda", 0), ("portable", 4)])
def test_the_default_level_is_the_graphs(graph: str, level: int, chosen: dict[str, TargetOptions]) -> None:
    assert run(["build", "--target", "ort", "--graph", graph]) == 2
    found = chosen["ort"]
    assert isinstance(found, OrtOptions)
    assert found.accuracy_level == level


def test_defaults_are_the_dataclasses(chosen: dict[str, TargetOptions]) -> None:
    assert run(["build", "--target", "coreml"]) == 2
    assert chosen["coreml"] == CoreMLOptions()


def test_every_field_is_one_option_with_help() -> None:
    flags = {flag.name: flag for flag in target_flags()}
    for target in target_infos():
        for field in option_fields(options_class(target)):
            assert flags[field.flag].owners[target] == field
            assert field.help
    for flag in flags.values():
        kinds = {(field.help, field.kind, field.repeated, field.minimum) for field in flag.owners.values()}
        assert len(kinds) == 1, f"{flag.name} means different things to different targets"
    names = [name for parameter in build_command.params for name in parameter.opts]
    assert sorted(names) == sorted(set(names))
    assert flags.keys() <= set(names)


def test_the_help_has_headings_for_each_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    headings = [line.rstrip(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
    for heading in ("All targets", "coreml and trt options", "coreml options", "ort options", "trt options"):
        assert heading in headings
    start = lines.index("ort options:")
    assert any(line.strip().startswith("--graph") for line in lines[start : start + 3])
