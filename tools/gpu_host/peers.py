"""The peers' wheels of a bundle: pure Python, with Triton kernels that compile on the GPU host.

flash-linear-attention's operators are fla-core, a wheel on PyPI (MIT). mamba-ssm (Apache-2.0) comes as source with a
CUDA extension that its package imports at once; the wheel made here has only its Triton operators and what they
import, without the package's own `__init__.py`, so that `import mamba_ssm.ops.triton...` needs no extension.
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

MAMBA = "2.3.2.post1"
FLA = "0.6.0"
EINOPS = "0.8.2"  # MIT; both peers import it
WHEELS = (f"fla-core=={FLA}", f"einops=={EINOPS}")
LICENCES = {"mamba-ssm": "Apache-2.0", "fla-core": "MIT", "einops": "MIT"}
TOOLS = "build-tools"  # a folder beside mamba-ssm's source
KEPT = ("mamba_ssm/ops/triton/", "mamba_ssm/utils/torch.py", "mamba_ssm/utils/determinism.py")


def build(folder: Path) -> list[Path]:
    """Download and repack the peers into ``folder``, and return their wheels.

    Raises:
        SystemExit: pip cannot get one of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pip("--only-binary", ":all:", *WHEELS, to=folder)
    with tempfile.TemporaryDirectory() as scratch:
        build_tools(Path(scratch) / TOOLS)
        pip("--no-binary", "mamba-ssm", "--no-build-isolation", f"mamba-ssm=={MAMBA}", to=Path(scratch))
        (source,) = Path(scratch).glob("mamba_ssm-*.tar.gz")
        mamba = repack(source, folder)
    return sorted([*folder.glob("fla_core-*.whl"), *folder.glob("einops-*.whl"), mamba])


def build_tools(folder: Path) -> None:
    """Install what mamba-ssm's setup.py imports for its metadata, besides torch, into ``folder``."""
    run_pip("install", "--target", str(folder), "--no-deps", "setuptools", "wheel", "packaging")


def pip(*words: str, to: Path) -> None:
    """Download packages without their dependencies."""
    run_pip("download", "--no-deps", "-d", str(to), *words, path=to / TOOLS)


def run_pip(*words: str, path: Path | None = None) -> None:
    """Run pip quietly, with the packages in ``path`` before all others.

    Raises:
        SystemExit: pip fails.
    """
    # mamba-ssm's setup.py runs for its metadata, and would look for nvcc
    settings = os.environ | {"MAMBA_SKIP_CUDA_BUILD": "TRUE"}
    if path is not None:
        settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pip", words[0], "-q", *words[1:]]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "rror" in line]
        why = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise SystemExit(
            f"gpu_host: {words[-1]}: pip cannot get it ({why}); mamba-ssm's setup.py needs torch installed"
        )


def repack(source: Path, folder: Path) -> Path:
    """Write a wheel with the Triton operators of mamba-ssm's source archive, and return its path."""
    info = f"mamba_ssm-{MAMBA}+triton.dist-info"
    files: dict[str, bytes] = {}
    with tarfile.open(source) as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            stream = archive.extractfile(member) if member.isfile() else None
            if stream is None:
                continue
            if name == "LICENSE":
                files[f"{info}/licenses/LICENSE"] = stream.read()
            elif name.endswith(".py") and name.startswith(KEPT):
                files[name] = stream.read()
    metadata = f"Metadata-Version: 2.4\nName: mamba-ssm\nVersion: {MAMBA}+triton\nLicense-Expression: Apache-2.0\n"
    files[f"{info}/METADATA"] = metadata.encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: h1export\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{name},sha256={digest(data)},{len(data)}\n" for name, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    path = folder / f"mamba_ssm-{MAMBA}+triton-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
    return path


def digest(data: bytes) -> str:
    """Return the sha256 of a file as a wheel's RECORD has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
