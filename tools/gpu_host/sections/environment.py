"""Section a: the machine, its GPU, and the software of the bundle."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata

from gpu_host import bundle
from gpu_host.section import Host, Row

NEEDED = ("torch", "triton", "transformers", "onnx", "onnx-ir", "safetensors", "tokenizers", "cloup", "pytest")
OPTIONAL = ("onnxruntime-gpu", "onnxruntime", "nvidia-ml-py")


def run(host: Host) -> Iterator[Row]:
    """Yield the machine, each package, the compilers, and whether torch and Triton reach the GPU."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    system = f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}"
    yield Row("machine", None, {"cores": cores, "memory_gb": round(memory / 1e9, 1), "system": system})
    for name in NEEDED + OPTIONAL:
        version = _version(name)
        if version is not None:
            yield Row(f"package {name}", True, {"version": version})
        else:
            yield Row(f"package {name}", False if name in NEEDED else None, detail="not installed")
    for tool in ("nvcc", "cmake", "c++", "ncu", "nsys"):
        yield Row(f"tool {tool}", None, {"found": "no" if shutil.which(tool) is None else "yes"})
    yield listed(host)
    import torch

    import h1export

    yield Row("h1export", True, {"version": h1export.__version__})
    if host.dry:
        yield Row("torch on the CPU", bool(torch.ones(2).sum() == 2), {"version": torch.__version__})
        return
    yield from _gpu()


def listed(host: Host) -> Row:
    """Return the row of the packages of pack.py's list of the host, which this Python has to have.

    One that is missing fails. Another version is shown: the bundle may bring it itself, or h1export may take it too.
    A dry run is no such host, and judges nothing.
    """
    wanted: dict[str, str] = bundle.facts(host.bundle)["host"]
    found = {name: _version(name) for name in wanted}
    missing = sorted(name for name, version in found.items() if version is None)
    other = {name: version for name, version in found.items() if version not in (None, wanted[name])}
    detail = [f"not installed: {', '.join(missing)}"] if missing else []
    detail += [f"{name} {version} instead of {wanted[name]}" for name, version in sorted(other.items())]
    figures = {"listed": len(wanted), "missing": len(missing), "other_version": len(other)}
    return Row("packages of the list", None if host.dry else not missing, figures, "; ".join(detail))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


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
