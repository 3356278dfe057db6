"""Every write of a command fails, one after the other: it must end in one line and leave what was there before."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from faults.cases import OUT, Case
from faults.forked import Ended, Process
from faults.library import CHANGES, ERROR, FOREVER, KINDS, SHORT, Call, Fault, Faults
from faults.places import difference, emptied, snapshot

FAILED = 2  # exit code of a command that could not run
NAME_OF_A_RUN = re.compile(r"[0-9a-f]{8,}|(?<=-)[a-z0-9_]{8}\b")


@dataclass
class Room:
    """Folders for the runs of a case.

    Attributes:
        scratch: the folder of all of them, and of messages.
        place: where the command writes.
        temporary: the system's folder of temporary files, as the process was told.
    """

    scratch: Path
    place: Path = field(init=False)
    temporary: Path = field(init=False)

    def __post_init__(self) -> None:
        self.place = self.scratch / "place"
        self.temporary = self.scratch / "tmp"

    def prepared(self, case: Case) -> None:
        """Put what was there before into a place that is empty otherwise."""
        emptied(self.temporary)
        case.before(emptied(self.place))

    def run(self, case: Case) -> Ended:
        """Run the command of a case."""
        return Process(case.work(self.place), self.scratch, stdin=case.stdin.format(place=self.place)).wait()


@dataclass
class Tally:
    """What became of the runs of a case."""

    calls: int = 0
    runs: int = 0
    refused: int = 0
    unharmed: int = 0
    faults: list[str] = field(default_factory=list)
    lines: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        return (
            f"{self.calls} calls, {self.runs} runs: {self.refused} refused, {self.unharmed} unharmed, "
            f"{len(self.faults)} faults"
        )


def run(case: Case, room: Room, control: Faults, *, most: int) -> Tally:
    """Fail the writes of ``case``, at most ``most`` runs of each way to fail, and return what was found."""
    room.prepared(case)
    before = snapshot(room.place, room.temporary)
    tally = Tally()
    control.arm(Fault(kinds=CHANGES + KINDS["close"]), room.place, room.temporary)
    ended = room.run(case)
    calls = control.calls()
    control.disarm()
    after = snapshot(room.place, room.temporary)
    tally.calls = len(calls)
    if ended.code not in (0, 1):
        tally.faults.append(f"it fails without a fault: exit code {ended.code}: {ended.error}")
        return tally
    tally.faults += [f"writes into mapped memory: {call.path}" for call in calls if call.kind == "map"]
    for what, fault in _faults(calls, most):
        room.prepared(case)
        control.arm(fault, room.place, room.temporary)
        ended = room.run(case)
        failed = control.failed
        control.disarm()
        tally.runs += 1
        found = snapshot(room.place, room.temporary)
        if ended.code != FAILED and (not case.stable or found == after) and found.keys() == after.keys():
            tally.unharmed += 1
            continue
        changed = "" if case.may_finish and found == after else difference(before, found)
        wrong = _wrong(ended, changed) if failed else "the call was not reached"
        if wrong:
            tally.faults.append(f"{what}: {wrong}")
        else:
            tally.refused += 1
            tally.lines.add(ended.error.strip())
    again = room.run(case)
    if again.code not in (0, 1) or (case.stable and snapshot(room.place, room.temporary) != after):
        tally.faults.append(f"a run with space again: exit code {again.code}: {again.error}")
    return tally


def _wrong(ended: Ended, changed: str) -> str:
    """Return what is wrong with the end of a command of which a write failed, or an empty text."""
    if ended.code != FAILED:
        return f"exit code {ended.code}, {changed or 'nothing changed'}: {ended.error[-500:]!r}"
    if f"/{OUT}: is complete, but may be lost" in ended.error:  # neither could it be put on the disk nor taken back
        changed = ""
    return ended.wrong_line() or (f"it leaves {changed}" if changed else "")


def _faults(calls: Sequence[Call], most: int) -> Iterator[tuple[str, Fault]]:
    """Yield the ways to fail, with what to call them."""
    everything = CHANGES + KINDS["close"]
    plain = [call for call in calls if call.kind != "close"]
    sites = _sampled(plain, most, every_site=True)
    for call in sites:
        yield _named(call, "full from"), Fault(_number(plain, call), FOREVER, errno.ENOSPC)
    for call in _sampled(plain, most // 2):
        yield _named(call, "full at"), Fault(_number(plain, call), 1, errno.ENOSPC)
    for call in _sampled([call for call in plain if call.kind in ("write", "sendfile")], most // 4):
        yield _named(call, "half of"), Fault(_number(plain, call), 2, errno.ENOSPC, SHORT)
        yield _named(call, "only half of"), Fault(_number(plain, call), 1, errno.ENOSPC, SHORT)
    for call in _sampled([call for call in plain if call.kind == "sync"], most // 4):
        yield _named(call, "EIO at"), Fault(_number(plain, call), 1, errno.EIO)
    for call in _sampled([call for call in calls if call.kind == "close"], most // 4):
        yield _named(call, "full at the"), Fault(call.number, 1, errno.ENOSPC, ERROR, everything)
    for error in (errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO):
        for call in _sampled(plain, max(4, most // 20)):
            yield _named(call, f"{errno.errorcode[error]} from"), Fault(_number(plain, call), FOREVER, error)


def _number(plain: Sequence[Call], call: Call) -> int:
    """Return the number of a call where closes are not counted."""
    return plain.index(call)


def _named(call: Call, what: str) -> str:
    return f"{what} {call.kind} {call.number} ({Path(call.path).name})"


def _sampled(calls: Sequence[Call], most: int, every_site: bool = False) -> list[Call]:
    """Return at most ``most`` calls at equal distances; with ``every_site`` the first of every kind and file too."""
    if len(calls) <= most:
        return list(calls)
    if not every_site:
        return [calls[index * len(calls) // most] for index in range(most)]
    first: dict[tuple[str, str], Call] = {}
    for call in calls:
        first.setdefault((call.kind, NAME_OF_A_RUN.sub("", call.path)), call)
    distance = len(calls) / max(1, most - len(first))
    others = [calls[int(index * distance)] for index in range(max(0, most - len(first)))]
    return sorted({*first.values(), *others, calls[-1]}, key=lambda call: call.number)
