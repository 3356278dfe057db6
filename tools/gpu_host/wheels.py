"""The wheels that a GPU host lacks, from pyproject.toml, the list of what the host has, and a package index."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Mapping
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gpu_host import bundle

HOST = Path(__file__).with_name("host_packages.txt")
KEPT = "# kept"
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64")
RUNTIME = "onnxruntime-gpu"  # a group of its own
MARKERS = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "sys_platform": "linux", "extra": ""}


def host_packages(path: Path) -> dict[str, tuple[str, bool]]:
    """Return canonical name -> (version, whether it stays although h1export asks for another).

    Raises:
        SystemExit: a line is not NAME==VERSION.
    """
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        name, equals, version = text.partition("==")
        if not equals or not version:
            raise SystemExit(f"pack: {path}: line {number} is not NAME==VERSION; write what pip freeze prints")
        found[canonicalize_name(name)] = (version, line.rstrip().endswith(KEPT))
    return found


def missing(requirements: Iterable[str], host: Mapping[str, tuple[str, bool]]) -> list[Requirement]:
    """Return the requirements that the host does not meet."""
    found = []
    for requirement in map(Requirement, requirements):
        if requirement.marker and not requirement.marker.evaluate(MARKERS):
            continue
        version, kept = host.get(canonicalize_name(requirement.name), (None, False))
        if version is None or not (kept or requirement.specifier.contains(version, prereleases=True)):
            found.append(requirement)
    return found


def requires(wheel: Path) -> list[str]:
    """Return what a wheel's metadata requires."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA") and n.count("/") == 1]
        return HeaderParser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []


def download(requirement: Requirement, folder: Path) -> Path:
    """Download the wheel of a requirement for the host's Python, without its dependencies."""
    before = set(folder.glob("*.whl"))
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    options = ["--python-version", PYTHON, *platforms, "--only-binary=:all:", "--no-deps", "-q", "-d", str(folder)]
    wanted = f"{requirement.name}{requirement.specifier}"
    try:
        subprocess.run([sys.executable, "-m", "pip", "download", *options, wanted], check=True)
    except subprocess.CalledProcessError:
        raise SystemExit(f"pack: {wanted}: pip found no wheel for Python {PYTHON}; see above") from None
    (made,) = set(folder.glob("*.whl")) - before
    return made


def own_wheel(root: Path, folder: Path) -> Path:
    """Build h1export's wheel; the commit's time stands in it, so that a commit gives the same bytes."""
    time = subprocess.run(
        ["git", "log", "-1", "--format=%ct"], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()
    archive = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=root, check=True, capture_output=True
    ).stdout
    source = folder.parent / "source"  # a copy: a build leaves files in the checkout
    for name in filter(None, archive.decode().split("\0")):
        if (root / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((root / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)]
    try:
        subprocess.run(command, check=True, env={**os.environ, "SOURCE_DATE_EPOCH": time})
    except subprocess.CalledProcessError:
        raise SystemExit("pack: h1export's own wheel could not be built; see above") from None
    (made,) = folder.glob("h1export-*.whl")
    return made


def collect(root: Path, folder: Path, host_file: Path, *, peers: bool) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return (wheels of core and of the peers, wheels of ONNX Runtime), by their names in the bundle.

    Args:
        root: the checkout.
        folder: where wheels are made and downloaded.
        host_file: what the host has.
        peers: whether the wheels of gpu_host.peers are made too, which get a folder of their own.
    """
    host = host_packages(host_file)
    folder.mkdir(parents=True)
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = _closure([*project["dependencies"], *project["optional-dependencies"]["export"]], host, folder)
    core.append(own_wheel(root, folder))
    (folder / "runtime").mkdir()
    known = {**host, **{canonicalize_name(w.name.split("-")[0]): (w.name.split("-")[1], False) for w in core}}
    runtime = _closure(project["optional-dependencies"]["cuda"], known, folder / "runtime")
    names = [{f"{bundle.WHEELS}/{wheel.name}": wheel for wheel in found} for found in (core, runtime)]
    if peers:
        from gpu_host import peers as others

        names[0] |= {f"{bundle.PEERS}/{wheel.name}": wheel for wheel in others.build(folder / "peers")}
    return names[0], names[1]


def _closure(requirements: list[str], host: Mapping[str, tuple[str, bool]], folder: Path) -> list[Path]:
    """Download what is missing, and what that needs in turn."""
    known = dict(host)
    found = []
    queue = missing(requirements, known)
    while queue:
        wheel = download(queue.pop(0), folder)
        name, version = wheel.name.split("-")[:2]
        known[canonicalize_name(name)] = (version, False)
        found.append(wheel)
        queue += [r for r in missing(requires(wheel), known) if r.name not in {q.name for q in queue}]
    return found
