"""ComputeDevice: where a method that looks at a text runs the model and solves for integers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from h1export.errors import H1ExportError
from h1export.quantize.choices import CPU

BATCH_TOKENS = 4096  # tokens that a GPU runs through a layer at a time; a CPU runs one sequence on each thread


@dataclass(frozen=True)
class ComputeDevice:
    """A device on which layers run, and moments, inverses and integers are computed.

    Integers are deterministic for one device: another one sums in another order. So the manifest names it.

    Attributes:
        place: torch's device.
        name: "cpu", or the GPU's name by its driver, such as "NVIDIA H100 80GB HBM3".
        halves: whether GPTQ computes a layer's products in bf16, the dtype of the published checkpoints, in which this
            CPU is about twice as fast. Moments that are inverted, and all else, stay in float32 and float64.
    """

    place: torch.device
    name: str
    halves: bool = False

    @classmethod
    def of(cls, choice: str) -> ComputeDevice:
        """Returns the device of a command line: cpu, cuda, or cuda:N for one of several GPUs.

        Raises:
            H1ExportError: another word, or a GPU that this torch cannot use here.
        """
        if choice == CPU:
            return cls(CPU_DEVICE.place, f"{CPU}, bf16", halves=True) if _multiplies_halves() else CPU_DEVICE
        option = f"--device {choice}"
        if not re.fullmatch(r"cuda(:\d{1,3})?", choice):
            raise H1ExportError("--device", f"{choice!r} is unknown", "give cpu, cuda, or cuda:N")
        instead = "or leave out --device"
        if torch.version.cuda is None:
            what = f"torch {torch.__version__} is built without CUDA"
            raise H1ExportError(option, what, f"install PyTorch's build for CUDA, {instead}")
        if not torch.cuda.is_available():
            raise H1ExportError(option, "torch finds no NVIDIA GPU here", f"check nvidia-smi, {instead}")
        if find_spec("triton") is None:
            raise H1ExportError(option, "Triton, which the kernels need, is not installed", f"install it, {instead}")
        place = torch.device(choice if ":" in choice else "cuda:0")
        if (place.index or 0) >= torch.cuda.device_count():
            raise H1ExportError(option, f"there are {torch.cuda.device_count()} GPUs here", "numbers start at 0")
        return cls(place, torch.cuda.get_device_name(place))

    @property
    def is_cpu(self) -> bool:
        return self.place.type == CPU

    def sequences(self, length: int) -> int:
        """Returns how many sequences of ``length`` tokens run through a layer at a time."""
        return 1 if self.is_cpu else max(1, BATCH_TOKENS // length)

    def threads(self, jobs: int) -> int:
        """Returns the threads that may run the model, of ``jobs``: a GPU is fed by one."""
        return jobs if self.is_cpu else 1

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Make results depend on the device alone, and a lack of its memory an error of one line.

        torch computes on the calling thread alone, because how many threads share a product changes its last bits.
        Products in float32 are not computed in TF32, whose 10 bits of mantissa are fewer than moments need.

        Raises:
            H1ExportError: the GPU's memory does not suffice.
        """
        threads = torch.get_num_threads()
        precision = torch.get_float32_matmul_precision()
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")
        try:
            if self.is_cpu:
                yield
            else:
                with torch.cuda.device(self.place):  # Triton launches on the current device
                    yield
        except torch.OutOfMemoryError:
            raise H1ExportError(
                f"--device {self.place}",
                f"the memory of the {self.name} does not suffice",
                "end what else uses it, give a smaller --calibration-length, or use --device cpu",
            ) from None
        finally:
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)


def _multiplies_halves() -> bool:
    """Returns whether this CPU has instructions for products in bf16."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


CPU_DEVICE = ComputeDevice(torch.device(CPU), CPU)
