"""What lies in a folder, so that two moments of it can be compared."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

Snapshot = dict[str, str]


def snapshot(*folders: Path) -> Snapshot:
    """Return path -> what is there, of everything below ``folders``: a sha256, "folder", or where a link leads."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            name = f"{folder.name}/{path.relative_to(folder)}"
            if path.is_symlink():
                found[name] = f"-> {os.readlink(path)}"
            elif path.is_dir():
                found[name] = "folder"
            elif path.is_file():
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[name] = "other"
    return found


def difference(old: Snapshot, new: Snapshot) -> str:
    """Return what was added, removed and changed as text; empty where the two are equal."""
    added = [f"+{name}" for name in new.keys() - old.keys()]
    removed = [f"-{name}" for name in old.keys() - new.keys()]
    changed = [f"*{name}" for name in old.keys() & new.keys() if old[name] != new[name]]
    return " ".join(sorted(added + removed + changed)[:12])


def emptied(folder: Path) -> Path:
    """Return ``folder``, made new and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
