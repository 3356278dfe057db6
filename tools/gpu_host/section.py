"""What a section of run.py is: a function that yields rows, run in a process of its own.

run.py writes each row to the section's JSON file when it is yielded, so that a section that is killed at its time limit
leaves the rows it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Figure = float | int | str | None


@dataclass(frozen=True)
class Host:
    """Where a section runs.

    Attributes:
        bundle: the folder of the joined bundle.
        work: a folder for files that later sections read; `gpu_host.bundle` says where which file is.
        device: "cuda", or "cpu" in a dry run, where a section runs the same code on the smallest sizes, over Triton's
            interpreter and stand-ins.
    """

    bundle: Path
    work: Path
    device: str

    @property
    def dry(self) -> bool:
        """Whether this is a dry run on a CPU; its figures are never reported."""
        return self.device == "cpu"


@dataclass(frozen=True)
class Row:
    """One result of a section.

    Attributes:
        name: what was done, such as "scan prefill 0.5B batch 8 tokens 4096".
        passed: whether the requirement was met; None for a figure without a requirement.
        figures: name with its unit, such as "median_us", to the value measured.
        detail: the reason of a failure, or what limits the figure; at most a few lines.
    """

    name: str
    passed: bool | None = None
    figures: Mapping[str, Figure] = field(default_factory=dict)
    detail: str = ""


Run = Callable[[Host], Iterator[Row]]  # `run` of a module in sections/


@dataclass(frozen=True)
class Section:
    """One section of run.py.

    Attributes:
        letter: what --only takes.
        module: the file in sections/, without its ending; it has a function `run` of type Run.
        title: what the section shows.
        limit_s: seconds after which its process is killed on a GPU host.
        dry_limit_s: the same in a dry run.
        on_demand: whether it runs only when --only names it.
        peers: whether the peers' packages stand on its path. transformers takes mamba-ssm's kernels wherever it finds
            them, on the CPU too, so no other section may see them.
        threads: OMP_NUM_THREADS of its process; None leaves it as it is. References of small models on the CPU take
            many times as long on all cores of a machine that also does other work.
    """

    letter: str
    module: str
    title: str
    limit_s: int
    dry_limit_s: int = 300
    on_demand: bool = False
    peers: bool = False
    threads: int | None = None


TOTAL_S = 480  # what the sections that are not on demand may take together

SECTIONS = (
    Section("a", "environment", "the machine and its software", 15),
    Section("s", "shape", "the random 0.5B checkpoint and its artifacts, from their seed", 65),
    Section("b", "kernel_tests", "pytest -m gpu of the kernels and ops", 125),
    Section("c", "plugin_launches", "the TensorRT plugin's launches on the real driver", 20, threads=4),
    Section("d", "artifacts", "validate of the CUDA artifacts, and 512 decode steps", 60, threads=4),
    Section("e", "speed", "kernels and models beside their peers and the roofline", 120, peers=True, threads=4),
    Section("f", "calibration", "GPTQ of the 0.5B shape on the GPU", 75),
    Section("g", "proxy", "training of the quality proxy", 590, on_demand=True),
)
