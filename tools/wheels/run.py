"""Build manylinux wheels with compiled CPU kernels, and show that they run; ``nox -s wheels`` runs it.

    python -m wheels.run DIST ARTIFACT [--machines x86_64 aarch64] [--without-tests]

1. An sdist, and from it a wheel for each machine, whose kernels Debian's GCC compiles; auditwheel names their platform.
2. This machine's wheel in an environment of its own, with a PATH on which nothing is: `generate` on the kernels of the
   wheel gives the text of those that are compiled here (at accuracy level 0, which does not magnify the roundings of
   another CPU's tuning). The sdist there: the stock graph, with a note.
3. The numeric tests of the kernels on every library of every wheel (levels.py).

DIST gets the sdist and the wheels. It needs Debian's g++, g++-aarch64-linux-gnu and qemu-user.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from wheels import levels
from wheels.levels import COMPILERS, ROOT

PACKAGES = {
    "x86_64-linux-gnu-g++": "g++",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
    "qemu-x86_64": "qemu-user",
}
MANYLINUX = re.compile(r"manylinux_2_(\d+)_")
MOST_GLIBC = 28  # 2.28, that of onnxruntime's wheels: older systems have no onnxruntime to load the kernels
NOTE = "runs on onnxruntime's own kernels, slower than h1export's"
PROMPT = ("def main(argv):", "--max-tokens", "24")


def run(words: Sequence[object], **environment: str) -> str:
    """Run a command and return what it printed; ends the program with that where it fails."""
    done = subprocess.run(
        [*map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{words[0]}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def build(dist: Path, machines: Sequence[str]) -> dict[str, Path]:
    """Make the sdist and the wheels in ``dist``; machine -> wheel."""
    run([sys.executable, "-m", "build", "--sdist", "--outdir", dist, ROOT])
    (sdist,) = dist.glob("*.tar.gz")
    found = {}
    for machine in machines:
        with tempfile.TemporaryDirectory() as raw:
            options = ["-C--build-option=--with-kernels", f"-C--build-option=--plat-name=linux_{machine}"]
            words = [sys.executable, "-m", "pip", "wheel", sdist, "--no-deps", "-w", raw, *options]
            run(words, CXX=COMPILERS[machine])
            (made,) = Path(raw).glob("*.whl")
            # "auto", because auditwheel takes the names of its own machine's platforms alone; no check of instructions,
            # because a library is loaded only where the CPU has those of its level
            options = ["--plat", "auto", "--disable-isa-ext-check", "-w", dist]
            run([sys.executable, "-m", "auditwheel", "repair", made, *options])
        (found[machine],) = dist.glob(f"*_{machine}.whl")
        glibc = MANYLINUX.search(found[machine].name)
        if glibc is None or int(glibc[1]) > MOST_GLIBC:
            sys.exit(
                f"{found[machine].name}: it needs a glibc newer than 2.{MOST_GLIBC}, which onnxruntime's wheels take"
            )
        print(f"{found[machine].name}: {found[machine].stat().st_size / 1e6:.1f} MB", flush=True)
    return found


def install(dist: Path, wheel: Path, artifact: Path) -> None:
    """Run the artifact where no compiler is: with the wheel, and with the sdist."""
    (sdist,) = dist.glob("*.tar.gz")
    here = generate(Path(sys.executable).with_name("h1export"), artifact, "compiled", environment={})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "nothing").mkdir()
        bare = {"PATH": str(folder / "nothing"), "CXX": "", "XDG_CACHE_HOME": str(folder / "cache")}
        run([sys.executable, "-m", "venv", folder / "clean"])
        pip = [folder / "clean" / "bin" / "python", "-m", "pip", "install", "-q", "--no-compile"]
        command = folder / "clean" / "bin" / "h1export"
        run([*pip, f"{wheel}[ort]"], **bare)
        text = generate(command, artifact, "native", environment=bare)
        if text != here:
            sys.exit(f"the wheel's kernels gave another text\n{text}\n{here}")
        print("without a compiler: the wheel's kernels give the text of those that are compiled here", flush=True)
        run([*pip, "--no-deps", "--force-reinstall", sdist], **bare)
        text = generate(command, artifact, "auto", environment=bare)
        if NOTE not in text:
            sys.exit(f"the sdist without a compiler did not say that it runs the stock graph\n{text}")
        print("without a compiler: the sdist installs, runs the stock graph, and says so", flush=True)


def generate(command: Path, artifact: Path, kernels: str, *, environment: Mapping[str, str]) -> str:
    """Return what `h1export generate` prints."""
    return run([command, "generate", artifact, *PROMPT, "--kernels", kernels], **environment)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path)
    parser.add_argument("artifact", type=Path, help="of the embedded model, --target ort --accuracy-level 0")
    parser.add_argument("--machines", nargs="+", choices=list(COMPILERS), default=list(COMPILERS))
    parser.add_argument("--without-tests", action="store_true", help="leave the numeric tests out")
    given = parser.parse_args()
    missing = sorted({package for program, package in PACKAGES.items() if not shutil.which(program)})
    if missing:
        sys.exit(f"wheels: on Debian, apt-get install {' '.join(missing)}")
    dist = given.dist.resolve()
    shutil.rmtree(dist, ignore_errors=True)
    dist.mkdir(parents=True)
    made = build(dist, given.machines)
    if platform.machine() in made:
        install(dist, made[platform.machine()], given.artifact.resolve())
    for machine, wheel in {} if given.without_tests else made.items():
        for outcome in levels.run(wheel, ("-n", str(os.cpu_count()))):
            print(f"{machine} {outcome.level}: {outcome.where}: {outcome.result}", flush=True)


if __name__ == "__main__":
    main()
