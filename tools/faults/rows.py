"""The rows of the table, each a function that runs it."""

from __future__ import annotations

import argparse
import importlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from faults import cases, kills, library, primitives, races, spots, writes
from faults.cases import BUILDS, QUICK, Case, Inputs
from faults.library import Faults
from faults.places import emptied
from faults.remembered import remembered
from faults.writes import Room

# what commands import when they run; sessions of a runtime have threads, so none may be open where a process forks
IMPORTED = (
    "h1export.commands.chat",
    "h1export.commands.doctor",
    "h1export.commands.gate",
    "h1export.commands.plan",
    "h1export.commands.sensitivity",
    "h1export.commands.validate",
    "h1export.report.page",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "transformers.models.falcon_h1.modeling_falcon_h1",
)

Row = tuple[str, Callable[[], Any]]


def rows(scratch: Path, given: argparse.Namespace) -> Iterator[Row]:
    """Yield name and function of every row."""
    emptied(scratch / "tmp")
    control = library.control()
    room = Room(scratch)
    for case in primitives.all_cases():
        yield f"writes: {case.name}", partial(writes.run, case, room, control, most=given.most)
    for case in primitives.all_cases()[:2]:
        yield f"kills: {case.name}", partial(kills.at_calls, case, room, control, most=given.most)
    targets = list(BUILDS) if given.targets == "all" else [name for name in given.targets.split(",") if name]
    if targets:
        yield from _of_targets(targets, room, control, given=given)


def _of_targets(targets: list[str], room: Room, control: Faults, *, given: argparse.Namespace) -> Iterator[Row]:
    inputs = _warmed(room.scratch, targets)
    builds = [cases.build(inputs, target, force=force) for target in targets for force in (False, True)]
    for case in builds:
        yield f"writes: {case.name}", partial(writes.run, case, room, control, most=given.most)
    for case in cases.others(inputs) if "ort" in targets else ():
        yield f"writes: {case.name}", partial(writes.run, case, room, control, most=given.most)
    if "coreml" in targets:
        yield "writes: coreml run --out", lambda: writes.run(cases.coreml_run(inputs), room, control, most=given.most)
    for case in builds:
        yield f"kills: {case.name}", partial(kills.at_random, case, room, count=given.kills // 2, seed=given.seed)
        yield f"kills at calls: {case.name}", partial(kills.at_calls, case, room, control, most=given.kills // 4)
    for target in targets:
        for name, pair in _pairs(inputs, target).items():
            yield f"races: {target}, {name}", partial(races.run, *pair, room, count=given.pairs, seed=given.seed)
    mounts = spots.can_mount(room.scratch)
    yield "places that take no build", partial(spots.run, cases.build(inputs, targets[0]), room, mounts=mounts)
    if mounts:
        yield "a full folder of temporary files", partial(spots.full_temporary, inputs, room)


def _warmed(scratch: Path, targets: list[str]) -> Inputs:
    """Import what the commands import, in this process, and make what they are given."""
    import torch

    from h1export.cli import run as command_line
    from h1export.commands import build

    torch.set_num_threads(1)
    for name in (*IMPORTED, *(("onnxruntime",) if "ort" in targets else ())):
        importlib.import_module(name)
    folder = emptied(scratch / "warm")
    with ExitStack() as stack:
        stack.enter_context(remembered(build, "trace"))
        if "trt" in targets:
            stack.enter_context(remembered(importlib.import_module("h1export.targets.tensorrt.plugin"), "compile_all"))
        inputs = Inputs.make(scratch, lambda words: command_line(list(words)))
        for target in targets:
            words = ("build", str(inputs.checkpoint), "--target", target, *QUICK, *BUILDS[target])
            if command_line([*words, "--out", str(folder / target)]) != 0:
                raise RuntimeError(f"a build for {target} fails without a fault")
    shutil.rmtree(folder)
    return inputs


def _pairs(inputs: Inputs, target: str) -> dict[str, tuple[Case, Case]]:
    """Return pairs of builders at one OUT."""
    plain, forced = (cases.build(inputs, target, force=force) for force in (False, True))
    other = cases.build(inputs, target, "--quant", "none", force=True)
    return {
        "the same": (plain, plain),
        "the same, --force": (forced, forced),
        "two precisions": (plain, replace(other, before=plain.before, words=_unforced(other))),
        "two precisions, --force": (forced, other),
    }


def _unforced(case: Case) -> Callable[[Path], list[str]]:
    return lambda place: [word for word in case.words(place) if word != "--force"]
