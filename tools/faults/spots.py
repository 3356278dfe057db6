"""OUTs that nothing can be built at: a file, a link, the working folder, a mount point, a full or read-only disk."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from faults.cases import OUT, Case, Inputs
from faults.forked import Ended, Process, command
from faults.places import difference, snapshot
from faults.writes import FAILED, Room


@dataclass
class Spots:
    """What became of builds at OUTs that take none."""

    refused: int = 0
    faults: list[str] = field(default_factory=list)
    lines: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        return f"{self.refused} refused, {len(self.faults)} faults"


def _file(place: Path) -> Path:
    (place / OUT).write_text("theirs", "utf-8")
    return place / OUT


def _link(place: Path) -> Path:
    (place / "elsewhere").mkdir()
    (place / OUT).symlink_to("elsewhere")
    return place / OUT


def _dangling(place: Path) -> Path:
    (place / OUT).symlink_to("nowhere")
    return place / OUT


def _below_a_file(place: Path) -> Path:
    return _file(place) / "deeper" / OUT


def _theirs(place: Path) -> Path:
    (place / OUT).mkdir()
    (place / OUT / "notes.txt").write_text("theirs", "utf-8")
    return place / OUT


def _mounted(place: Path) -> Path:
    (place / OUT).mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(place / OUT)], check=True)
    return place / OUT


def _full(place: Path) -> Path:
    (place / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(place / "disk")], check=True)
    return place / "disk" / OUT


def _read_only(place: Path) -> Path:
    (place / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(place / "disk")], check=True)
    return place / "disk" / OUT


PLACES: dict[str, Callable[[Path], Path]] = {
    "a file": _file,
    "a link to a folder": _link,
    "a link to nothing": _dangling,
    "below a file": _below_a_file,
    "somebody's folder": _theirs,
    "a name of 256 bytes": lambda place: place / ("x" * 256),
    "a name without room for a suffix": lambda place: place / ("x" * 254),
    "/": lambda _: Path("/"),
    "/proc": lambda _: Path("/proc/out"),
}
MOUNTS = {"a mount point": _mounted, "a full disk": _full, "a read-only disk": _read_only}


def run(case: Case, room: Room, *, mounts: bool) -> Spots:
    """Build at every place, with --force too; what is there must stay."""
    spots = Spots()
    for name, make in {**PLACES, **(MOUNTS if mounts else {})}.items():
        for force in (False, True):
            room.prepared(case)
            out = make(room.place)
            before = snapshot(room.place)
            ended = _built(case, room, out, force=force)
            found = snapshot(room.place)
            if name in MOUNTS:
                subprocess.run(["umount", str(out if name == "a mount point" else out.parent)], check=True)
            _judge(spots, f"{name}{' --force' if force else ''}", ended, changed=difference(before, found))
    return spots


def _judge(spots: Spots, what: str, ended: Ended, *, changed: str) -> None:
    spots.lines.add(ended.error.strip())
    wrong = ended.wrong_line() if ended.code == FAILED else f"exit code {ended.code}: {ended.error}"
    if changed and not wrong:
        wrong = f"it leaves {changed}"
    if wrong:
        spots.faults.append(f"{what}: {wrong}")
    else:
        spots.refused += 1


def _built(case: Case, room: Room, out: Path, *, force: bool) -> Ended:
    words = [str(out) if word == str(room.place / OUT) else word for word in case.words(room.place)]
    return Process(command([*words, *(("--force",) if force else ())]), room.scratch).wait()


def can_mount(scratch: Path) -> bool:
    """Whether this process may mount a file system."""
    folder = scratch / "mount"
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], capture_output=True).returncode == 0
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)
    return mounted


def full_temporary(inputs: Inputs, room: Room) -> Spots:
    """Plan with a folder of temporary files that is full: a plan writes nowhere else."""
    spots = Spots()
    room.prepared(Case("plan", lambda _: ()))
    options = ["-o", "size=64k", "none", str(room.temporary)]
    subprocess.run(["mount", "-t", "tmpfs", *options], check=True)
    try:
        filling = os.open(room.temporary / "filling", os.O_CREAT | os.O_WRONLY)
        try:
            while True:
                os.write(filling, bytes(4096))
        except OSError:
            os.close(filling)
        words = ("plan", str(inputs.checkpoint), "--target", "ort", "--method", "rtn", "--json")
        ended = Process(command(words), room.scratch).wait()
        if ended.code == 0:  # another folder of the system took its place
            spots.refused += 1
        else:
            _judge(spots, "a full folder of temporary files", ended, changed="")
    finally:
        subprocess.run(["umount", str(room.temporary)], check=True)
    return spots
