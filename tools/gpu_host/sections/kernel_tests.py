"""Section b: the repository's GPU tests, by pytest -m gpu, one file after the other.

Every file with a GPU test is in RUN or in CANNOT; a test of the repository compares them with what pytest collects.
"""

from __future__ import annotations

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
WORKERS = ("-n", "8", "--dist=load")  # Triton compiles on CPU cores


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
    options = ["-q", "-p", "no:cacheprovider", "-m", marker, "-o", "junit_family=xunit1", f"--junitxml={report}"]
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


def run(host: Host) -> Iterator[Row]:
    """Yield a row for each test that ran, and one for each file that cannot run here."""
    tree = bundle.tree(host)
    for name, reason in CANNOT.items():
        yield Row(name, None, detail=f"cannot run here: {reason}")
    calls = [(name, "gpu") for name in files(tree)]
    if host.dry:  # over the interpreter; test_run.py of the repository collects the GPU tests
        calls = [(name, "not gpu") for name in DRY]
    workers = WORKERS if not host.dry and find_spec("xdist") else ()
    for number, (chosen, marker) in enumerate(calls):
        report = host.work / f"pytest-{number}.xml"
        report.unlink(missing_ok=True)
        command = [*pytest_command(chosen.split(), report, marker), *workers]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
        if done.returncode == 5:  # no GPU test in it
            continue
        if not report.exists():
            yield Row(
                chosen, False, detail=f"pytest ended with {done.returncode}: {done.stdout[-800:]}{done.stderr[-800:]}"
            )
            continue
        yield from rows(report, skips_pass=host.dry)
