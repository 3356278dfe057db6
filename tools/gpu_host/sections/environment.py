"""Section a: the machine, its GPU, and the software of the bundle."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata

from gpu_host.section import Host, Row

NEEDED = ("torch", "triton", "transformers", "onnx", "onnx-ir", "safetensors", "tokenizers", "cloup", "pytest")
OPTIONAL = ("onnxruntime-gpu", "onnxruntime", "nvidia-ml-py")


def run(host: Host) -> Iterator[Row]:
    """Yield the machine, each package, the compilers, and whether torch and Triton reach the GPU."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    yield Row("machine", None, {"cores": cores, "memory_gb": round(memory / 1e9, 1), "system": platform.platform()})
    for name in NEEDED + OPTIONAL:
        try:
            yield Row(f"package {name}", True, {"version": metadata.version(name)})
        except metadata.PackageNotFoundError:
            yield Row(f"package {name}", False if name in NEEDED else None, detail="not installed")
    for tool in ("nvcc", "cmake", "c++", "ncu", "nsys"):
        yield Row(f"tool {tool}", None, {"path": shutil.which(tool)})
    import torch

    import h1export

    yield Row("h1export", True, {"version": h1export.__version__})
    if host.dry:
        yield Row("torch on the CPU", bool(torch.ones(2).sum() == 2), {"version": torch.__version__})
        return
    yield from _gpu()


def _gpu() -> Iterator[Row]:
    import torch

    if not torch.cuda.is_available():
        yield Row("torch on the GPU", False, {"version": torch.__version__}, "torch.cuda.is_available() is False")
        return
    device = torch.cuda.get_device_properties(0)
    capability = ".".join(map(str, torch.cuda.get_device_capability(0)))
    figures = {
        "name": device.name,
        "capability": capability,
        "memory_gb": round(device.total_memory / 1e9, 1),
        "multiprocessors": device.multi_processor_count,
        "cuda": torch.version.cuda,
    }
    total = torch.ones(1 << 20, device="cuda").sum().item()
    yield Row("torch on the GPU", total == 1 << 20, figures)
