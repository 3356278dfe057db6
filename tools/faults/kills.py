"""Builds that are killed at random moments, and at calls that change files: OUT is old, new or absent, never mixed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from faults.cases import OUT, Case
from faults.forked import Process, Work, command
from faults.library import KILL, Fault, Faults
from faults.places import Snapshot, difference, snapshot
from faults.writes import Room, _sampled


@dataclass
class Deaths:
    """What became of the builds of a case.

    Attributes:
        killed: builds that were killed before their end.
        old: of them, those that left what was there before.
        new: of them, those that had finished their work.
        left: of them, those that left a stage for the next build.
        faults: what was wrong.
    """

    killed: int = 0
    old: int = 0
    new: int = 0
    left: int = 0
    faults: list[str] = field(default_factory=list)
    lines: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        return (
            f"{self.killed} killed: {self.old} left what was there, {self.new} the new artifact, {self.left} a stage; "
            f"{len(self.faults)} faults"
        )


@dataclass(frozen=True)
class Ends:
    """A case, and the two things that may be at its OUT.

    Attributes:
        case: the build.
        before: what is there before.
        after: what a build makes.
        seconds: how long a build runs.
    """

    case: Case
    before: Snapshot
    after: Snapshot
    seconds: float

    @classmethod
    def of(cls, case: Case, room: Room) -> Ends:
        """Build once without a kill."""
        room.prepared(case)
        before = snapshot(room.place)
        ended = room.run(case)
        if ended.code != 0:
            raise RuntimeError(f"{case.name}: exit code {ended.code}: {ended.error}")
        return cls(case, before, snapshot(room.place), ended.seconds)


def at_random(case: Case, room: Room, *, count: int, seed: int) -> Deaths:
    """Kill ``count`` builds at random moments; the next build begins where each was killed."""
    ends = Ends.of(case, room)
    numbers = random.Random(seed)
    deaths = Deaths()

    def killed() -> bool:
        process = Process(case.work(room.place), room.scratch)
        time.sleep(numbers.uniform(0, ends.seconds))
        process.kill()
        return process.wait().code < 0

    while deaths.killed < count:
        _one(ends, room, deaths, what=f"kill {deaths.killed}", killed=killed)
    return deaths


def at_calls(case: Case, room: Room, control: Faults, *, most: int) -> Deaths:
    """Kill builds right before the calls that change files."""
    room.prepared(case)
    control.arm(Fault(), room.place)
    room.run(case)
    calls = control.calls()
    control.disarm()
    ends = Ends.of(case, room)
    deaths = Deaths()
    for call in _sampled(calls, most):

        def killed(number: int = call.number) -> bool:
            control.arm(Fault(number, 1, 0, KILL), room.place)
            code = room.run(case).code
            control.disarm()
            return code < 0

        what = f"kill before {call.kind} {call.number} ({Path(call.path).name})"
        _one(ends, room, deaths, what=what, killed=killed)
    return deaths


def _one(ends: Ends, room: Room, deaths: Deaths, *, what: str, killed: Callable[[], bool]) -> None:
    """Kill one build and run another to its end."""
    room.prepared(ends.case)
    if not killed():
        return
    deaths.killed += 1
    found = snapshot(room.place)
    at_out = _at_out(found)
    if at_out == _at_out(ends.before):
        deaths.old += 1
    elif at_out == _at_out(ends.after):
        deaths.new += 1
    else:
        deaths.faults.append(f"{what}: at OUT is {difference(_at_out(ends.after), at_out)}")
    left = {name.split("/")[1] for name in found} - {OUT}
    deaths.left += bool(left)
    if len(left) > 1:
        deaths.faults.append(f"{what}: it leaves {sorted(left)}")
    if at_out == _at_out(ends.after) and ends.case.does is not None:
        return
    again = Process(_forced(ends.case, room), room.scratch).wait()
    if again.code != 0:
        deaths.faults.append(f"{what}: the next build ends with {again.code}: {again.error}")
    elif changed := difference(ends.after, snapshot(room.place)):
        deaths.faults.append(f"{what}: the next build makes {changed}")


def _forced(case: Case, room: Room) -> Work:
    """Return a build that replaces what the killed one may have finished."""
    if case.does is not None:
        return case.work(room.place)
    words = list(case.words(room.place))
    return command(words if "--force" in words else [*words, "--force"])


def _at_out(found: Snapshot) -> Snapshot:
    return {name: what for name, what in found.items() if name.split("/")[1] == OUT}
