"""Two builders at one OUT at once: one wins, or one gets an error; never a mixed artifact, and nothing is left."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

from faults.cases import OUT, Case
from faults.forked import Ended, Process
from faults.places import Snapshot, difference, snapshot
from faults.writes import FAILED, Room


@dataclass
class Races:
    """What became of pairs of builders."""

    pairs: int = 0
    both: int = 0
    one: int = 0
    none: int = 0
    killed: int = 0
    faults: list[str] = field(default_factory=list)
    lines: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        return (
            f"{self.pairs} pairs, in {self.killed} one was killed: both finished {self.both}, one {self.one}, "
            f"none {self.none}; {len(self.faults)} faults"
        )


def _made(case: Case, room: Room) -> tuple[Snapshot, float]:
    room.prepared(case)
    ended = room.run(case)
    if ended.code != 0:
        raise RuntimeError(f"{case.name}: exit code {ended.code}: {ended.error}")
    return snapshot(room.place), ended.seconds


def run(first: Case, second: Case, room: Room, *, count: int, seed: int) -> Races:
    """Run ``count`` pairs of builders that start at random moments of each other; every third time one is killed."""
    made = [_made(case, room) for case in (first, second)]
    room.prepared(first)
    before = snapshot(room.place)
    numbers = random.Random(seed)
    races = Races()
    seconds = max(length for _, length in made)
    for number in range(count):
        room.prepared(first)
        late = numbers.choice((0.0, 0.02, 0.2, seconds / 2))
        delays = [0.0, late] if number % 2 else [late, 0.0]
        pair = [
            Process(case.work(room.place), room.scratch, name, start=delay)
            for case, name, delay in zip((first, second), ("first", "second"), delays, strict=True)
        ]
        victim = numbers.randrange(2) if number % 3 == 2 else None
        if victim is not None:
            time.sleep(numbers.uniform(0.1, 1) * seconds)
            pair[victim].kill()
        _judge([process.wait() for process in pair], room, races, allowed=[before, *(snap for snap, _ in made)])
    return races


def _judge(ends: list[Ended], room: Room, races: Races, *, allowed: list[Snapshot]) -> None:
    races.pairs += 1
    what = f"pair {races.pairs}"
    done = sum(ended.code == 0 for ended in ends)
    dead = sum(ended.code < 0 for ended in ends)
    races.killed += bool(dead)
    races.both += done == 2
    races.one += done == 1
    races.none += done == 0
    for ended in ends:
        if ended.code == FAILED:
            races.lines.add(ended.error.strip())
            if wrong := ended.wrong_line():
                races.faults.append(f"{what}: {wrong}")
        elif ended.code > 0:
            races.faults.append(f"{what}: exit code {ended.code}: {ended.error}")
    if not done and not dead:
        races.faults.append(f"{what}: neither finished: {[ended.error for ended in ends]}")
    found = snapshot(room.place)
    at_out = {name: what for name, what in found.items() if name.split("/")[1] == OUT}
    if at_out not in (allowed if dead else allowed[1:]):
        races.faults.append(f"{what}: at OUT is {difference(allowed[1], at_out)}")
    left = sorted({name.split("/")[1] for name in found} - {OUT})
    if len(left) > dead:
        races.faults.append(f"{what}: {left} are left")
