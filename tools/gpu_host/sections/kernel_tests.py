"""Section b: the repository's GPU tests, by one call of pytest -m gpu: each call pays for the start of its workers.

Every file with a GPU test is in RUN or in CANNOT; a test of the repository compares them with what pytest collects.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from gpu_host import bundle
from gpu_host.section import Host, Row

RUN = (
    "tests/plugins",
    "tests/graphs/test_on_device.py",
    "tests/quantize/test_device.py",
    "tests/targets/onnxruntime/test_cuda.py",
    "tests/targets/onnxruntime/test_cuda_bf16.py",
    "tests/targets/onnxruntime/test_cuda_kernels.py",
    "tests/targets/onnxruntime/test_fixed_decode.py",
)
CANNOT: Mapping[str, str] = {  # file -> why its GPU tests cannot run on the GPU host
    "tests/targets/tensorrt/test_gpu.py": (
        "it builds engines: the GPU host has no TensorRT, and TensorRT-RTX builds none for compute capability 9.0"
    ),
}
DRY = ("tests/plugins/gpu/test_conv_kernel.py::test_pieces_chained_by_their_states_are_the_whole",)
WORKERS = ("-n", "12", "--dist=load")  # Triton compiles on CPU cores
STOP_S = 110  # seconds after which pytest is interrupted, so that it still reports the tests that have ended
INTERRUPTED_S = 10  # seconds that it then has to write its report


def files(tree: Path) -> list[str]:
    """Return the test files of RUN that may have GPU tests, relative to ``tree``."""
    found = []
    for name in RUN:
        path = tree / name
        candidates = sorted(path.rglob("test_*.py")) if path.is_dir() else [path]
        found += [file.relative_to(tree).as_posix() for file in candidates]
    return found


def pytest_command(chosen: Sequence[str], report: Path, marker: str) -> list[str]:
    """Return the call of pytest that writes JUnit's ``report``."""
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "-m",
        marker,
        "-o",
        "junit_family=xunit1",
        f"--junitxml={report}",
    ]
    return [sys.executable, "-m", "pytest", *options, *chosen]


def rows(report: Path, skips_pass: bool) -> Iterator[Row]:
    """Yield a row for each test in a JUnit report; a skip is a failure where a GPU is."""
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('file') or case.get('classname')}::{case.get('name')}"
        figures = {"seconds": round(float(case.get("time") or 0), 2)}
        wrong = [mark for kind in ("failure", "error") for mark in case.iter(kind)]
        skipped = case.find("skipped")
        if wrong:
            text = (wrong[0].get("message") or "") + "\n" + (wrong[0].text or "")[-1500:]
            yield Row(name, False, figures, text)
        elif skipped is not None:
            yield Row(name, None if skips_pass else False, figures, f"skipped: {skipped.get('message')}")
        else:
            yield Row(name, True, figures)


def _interruptible() -> None:
    """Let SIGINT interrupt: where this host runs in a shell's background it is ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def call(command: Sequence[str], tree: Path, stop_s: float) -> tuple[str, bool]:
    """Run pytest in ``tree``, interrupt it after ``stop_s`` seconds, and return its output and whether it ended itself.

    Each worker has one thread for the CPU's operators, because there are as many workers as cores.
    """
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=_interruptible,
    )
    try:
        return process.communicate(timeout=stop_s)[0], True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=INTERRUPTED_S)[0], False
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0], False


def run(host: Host) -> Iterator[Row]:
    """Yield a row for each test that ran, and one for each file that cannot run here."""
    tree = bundle.tree(host)
    for name, reason in CANNOT.items():
        yield Row(name, None, detail=f"cannot run here: {reason}")
    workers = WORKERS if not host.dry and find_spec("xdist") else ()
    # a dry run is over the interpreter; test_run.py of the repository collects the GPU tests
    chosen, marker = (DRY, "not gpu") if host.dry else (files(tree), "gpu")
    yield from tested(host, [*chosen, *workers], marker, stop_s=STOP_S)


def tested(host: Host, chosen: Sequence[str], marker: str, *, stop_s: float) -> Iterator[Row]:
    """Yield a row for each test of one call of pytest, and a failure where it did not end by itself."""
    report = host.work / "pytest.xml"
    report.unlink(missing_ok=True)
    output, ended = call(pytest_command(chosen, report, marker), bundle.tree(host), stop_s)
    if report.exists():
        yield from rows(report, skips_pass=host.dry)
    if not ended:
        yield Row("all tests in time", False, {"seconds": stop_s}, "interrupted: not every test has a row")
    elif not report.exists():
        yield Row("pytest", False, detail=f"no report: {output[-1600:]}")
