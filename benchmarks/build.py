"""Measure one build: seconds, peak memory, size. The build runs in a worker process.

    python benchmarks/build.py /path/to/checkpoint --quant int4 --json figures.json

Peak anonymous memory is the largest RssAnon that the kernel reports, sampled every 20 ms: memory that the process needs
for itself, without file pages (a mapped checkpoint), which the kernel may drop at any time. Quote figures of an idle
machine only.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.table import Table

from h1export.commands.build import build_artifact
from h1export.quantize.choices import GROUP_SIZES
from h1export.quantize.scheme import QuantScheme
from h1export.targets import target_infos

INTERVAL = 0.02  # seconds between two looks at the build's memory


@dataclass(frozen=True)
class Figures:
    """What one build took.

    Attributes:
        seconds: wall time of the whole process, interpreter start and imports included.
        peak_anonymous_bytes: see the module.
        source_bytes: the checkpoint's safetensors files.
        artifact_bytes: every file of the artifact.
        toolchain: package -> version, from the artifact's manifest.
    """

    checkpoint: str
    target: str
    quant: str
    method: str
    group_size: int
    seconds: float
    peak_anonymous_bytes: int
    source_bytes: int
    artifact_bytes: int
    cpu: str
    cores: int
    date: str
    toolchain: dict[str, str]

    @property
    def source_mb_per_second(self) -> float:
        """Checkpoint megabytes per second of the whole process."""
        return self.source_bytes / 1e6 / self.seconds


def status_bytes(pid: int, field: str) -> int:
    """A figure of a process from /proc/PID/status, in bytes; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def run_watched(
    command: list[str], field: str = "RssAnon", limit: float | None = None, *, stdout: IO[str] | None = None
) -> tuple[float, int]:
    """Run ``command`` to its end; (wall seconds, the largest ``field`` of its status in bytes).

    Raises:
        subprocess.CalledProcessError: it failed.
        subprocess.TimeoutExpired: it took more than ``limit`` seconds, and was killed.
    """
    start = time.perf_counter()
    peak = 0
    with subprocess.Popen(command, stdout=stdout) as process:
        while process.poll() is None:
            peak = max(peak, status_bytes(process.pid, field))
            if limit is not None and time.perf_counter() - start > limit:
                process.kill()
                raise subprocess.TimeoutExpired(command, limit)
            time.sleep(INTERVAL)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds, peak


def cpu_model() -> str:
    """The processor's name as the kernel gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def measure(
    checkpoint: Path,
    target: str = "ort",
    quant: str = "int4",
    *,
    method: str = "rtn",
    group_size: int = 32,
    scratch: Path | None = None,
) -> Figures:
    """Build once and collect the figures.

    Raises:
        subprocess.CalledProcessError: the build failed.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        out = Path(folder, "artifact")
        options = ["--target", target, "--quant", quant, "--method", method, "--group-size", str(group_size)]
        seconds, peak = run_watched([sys.executable, __file__, str(checkpoint), *options, "--child", str(out)])
        toolchain = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["toolchain"]
        return Figures(
            checkpoint=checkpoint.name,
            target=target,
            quant=quant,
            method=method,
            group_size=group_size,
            seconds=seconds,
            peak_anonymous_bytes=peak,
            source_bytes=sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")),
            artifact_bytes=sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
            cpu=cpu_model(),
            cores=os.cpu_count() or 1,
            date=datetime.date.today().isoformat(),
            toolchain=toolchain,
        )


def show(figures: Figures) -> None:
    """Print the figures as a table."""
    table = Table(
        title=f"{figures.checkpoint} to {figures.target}, {figures.quant} by {figures.method}",
        caption=f"{figures.cpu}, {figures.cores} cores, {figures.date}",
    )
    for column in ("seconds", "peak anonymous MB", "source MB", "artifact MB", "source MB/s"):
        table.add_column(column, justify="right")
    megabytes = [
        f"{value / 1e6:.0f}" for value in (figures.peak_anonymous_bytes, figures.source_bytes, figures.artifact_bytes)
    ]
    table.add_row(f"{figures.seconds:.1f}", *megabytes, f"{figures.source_mb_per_second:.1f}")
    Console().print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--target", choices=list(target_infos()), default="ort")
    parser.add_argument("--quant", choices=["none", "int8", "int4"], default="int4")
    parser.add_argument("--method", choices=["rtn", "search", "awq", "gptq"], default="rtn")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=32)
    parser.add_argument(
        "--scratch",
        type=Path,
        help="where the artifact is stored while it is measured (default: the system's temporary folder)",
    )
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # the measured process: build there, and no more
    args = parser.parse_args()
    if args.child:
        scheme = QuantScheme(args.quant, args.group_size, args.method)
        build_artifact(args.checkpoint, args.target, args.child, scheme=scheme)
        return
    try:
        figures = measure(
            args.checkpoint,
            args.target,
            args.quant,
            method=args.method,
            group_size=args.group_size,
            scratch=args.scratch,
        )
    except subprocess.CalledProcessError as error:
        sys.exit(f"{args.checkpoint}: the build above failed with exit code {error.returncode}")
    if args.json:
        text = json.dumps({**asdict(figures), "source_mb_per_second": figures.source_mb_per_second}, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")
    show(figures)


if __name__ == "__main__":
    main()
