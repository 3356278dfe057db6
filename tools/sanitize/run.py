"""Everything of this folder, in the order of the table that it prints; ``nox -s sanitize`` runs it.

    python -m sanitize.run ARTIFACT [--nodes 20000] [--seed 0]

First it shows that it would see a fault: an op without its check of columns must be reported. Exit code 1: a report.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from h1export.targets.onnxruntime import kernel_build, native_library
from sanitize import builds, plugin_cases
from sanitize.builds import ENVIRONMENT, MEMORY, REPORT, THREADS, Build

TOOLS = Path(__file__).parents[1]
NATIVE = Build("native", (*MEMORY, "-march=native"))
OTHERS = (
    Build("avx2", (*MEMORY, "-march=haswell")),
    Build("portable", (*MEMORY, "-march=native", "-DH1_PORTABLE")),
)
POOL = Build("threads", (*THREADS, "-march=native"))
PLANTED = (
    "require(lies_within(a.last(), a_offset_, width_) && lies_within(gate.last(), gate_offset_, width_),",
    "require(true,",
)
CHANGES = 3  # of a node, at most


def nodes(program: Path, seed: int, count: int, *, changes: int = CHANGES, calls: int = 1) -> tuple[int, str]:
    """Run nodes of a seed, and return the exit code and what was printed."""
    words = [str(program), str(seed), str(count), str(changes), str(calls)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | ENVIRONMENT, errors="replace")
    return done.returncode, done.stdout + done.stderr[-4000:]


def planted(folder: Path) -> str:
    """Return the report that a planted fault gives; raises where there is none."""
    source = kernel_build.FOLDER / "csrc" / "silu_mul.cc"
    text = source.read_text("utf-8")
    assert text.count(PLANTED[0]) == 1
    copy = folder / "silu_mul.cc"
    copy.write_text(text.replace(*PLANTED), "utf-8")
    others = tuple(path for path in native_library.SOURCES if path != source)
    program = Build("planted", NATIVE.flags, (*others, copy)).compile(folder)
    code, text = nodes(program, 0, 4000)
    if code not in (REPORT, 1) or ("Sanitizer" not in text and "runtime error" not in text):
        raise RuntimeError(f"a planted fault was not reported: exit code {code}\n{text}")
    return "reported"


def ran(program: Path, seed: int, count: int, **how: int) -> str:
    """Return how many nodes ran and were refused; raises at a report."""
    code, text = nodes(program, seed, count, **how)
    if code != 0:
        raise RuntimeError(f"exit code {code} of seed {seed}\n{text}")
    words = [line.split() for line in text.splitlines()]
    computed, refused = (sum(int(line[place]) for line in words) for place in (2, 4))
    assert computed > count // 10
    return f"{computed} computed, {refused} refused, 0 reports"


def fuzzed(folder: Path, seconds: int) -> str:
    """Run libFuzzer on the same nodes; raises at a report."""
    program = Build("fuzzer", (*MEMORY, "-march=native", "-fsanitize=fuzzer")).compile(folder, ("-DH1_FUZZER",))
    limits = [
        f"-max_total_time={seconds}",
        "-max_len=256",
        "-rss_limit_mb=4096",
        "-seed=1",
        "-verbosity=0",
        "-print_final_stats=1",
    ]
    done = subprocess.run([str(program), *limits], capture_output=True, text=True, cwd=folder, errors="replace")
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-4000:])
    (runs,) = [line.split()[-1] for line in done.stderr.splitlines() if "number_of_executed_units" in line]
    return f"{runs} nodes, 0 reports"


def artifacts(folder: Path, artifact: Path, count: int) -> str:
    """Use mutated artifacts in ONNX Runtime, with the address sanitizer in the process; raises at a report."""
    library = builds.kernels(folder)
    options = ENVIRONMENT["ASAN_OPTIONS"] + ":detect_leaks=0"  # Python frees little at its end
    environment = os.environ | {"LD_PRELOAD": str(builds.address_sanitizer()), "ASAN_OPTIONS": options}
    command = [sys.executable, "-m", "sanitize.artifacts", str(artifact), str(count), "0", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TOOLS, env=environment, errors="replace")
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}\n{done.stderr[-4000:]}")
    return f"{done.stdout.strip()}, 0 reports"


def main() -> int:
    """Run every step, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="a small artifact for ONNX Runtime on a CPU, with integers")
    parser.add_argument("--nodes", type=int, default=20_000, help="nodes of the main run; the others follow from it")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    count, seed = given.nodes, given.seed
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (plugin := folder / "plugin").mkdir()
        steps: dict[str, Callable[[], str]] = {
            "a planted fault": lambda: planted(folder),
            f"{count} nodes, native": lambda: ran(NATIVE.compile(folder), seed, count),
            **{
                f"{count // 4} nodes, {build.name}": lambda build=build: ran(
                    build.compile(folder), seed + 1, count // 4
                )
                for build in OTHERS
            },
            f"{count // 20} nodes, 3 calls at once, thread sanitizer": lambda: ran(
                POOL.compile(folder), seed + 2, count // 20, changes=0, calls=3
            ),
            "libFuzzer, 60 s": lambda: fuzzed(folder, 60),
            f"{count // 5} calls of the TensorRT plugin": lambda: str(plugin_cases.run(plugin, count // 5, seed)),
            f"{count // 100} mutated artifacts": lambda: artifacts(folder, given.artifact, count // 100),
        }
        for name, step in steps.items():
            start = time.monotonic()
            print(f"{name}: ", end="", flush=True)
            print(f"{step()} ({time.monotonic() - start:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
