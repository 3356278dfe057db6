"""The CUDA libraries that onnxruntime-gpu needs: pip packages such as nvidia-cublas, or an installed CUDA toolkit.

Importing onnxruntime does not load them; onnxruntime.preload_dlls() finds those of pip packages. Source: "Install ONNX
Runtime", section "Preload DLLs", of ONNX Runtime's documentation.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import re
from pathlib import Path

from h1export.targets.onnx import sdk

NEXT_STEP = (
    "install its libraries with pip install 'onnxruntime-gpu[cuda,cudnn]' and look at nvidia-smi for the driver, "
    "or build with --graph cpu"
)
PROVIDER = "libonnxruntime_providers_cuda.so"
# what the dynamic loader of Linux says of a library that it does not find
ABSENT = re.compile(r"^([^:\s]+): cannot open shared object file")


def preload() -> None:
    """Load CUDA's and cuDNN's libraries from pip packages, where there are some; onnxruntime prints what it misses."""
    with contextlib.redirect_stdout(io.StringIO()):  # what is missing may be in the system's CUDA; see missing()
        sdk.onnxruntime().preload_dlls()


def missing() -> str:
    """Return ", because NAME is missing" for the first library that the CUDA provider needs; empty: none is known."""
    library = Path(sdk.onnxruntime().__file__ or "").parent / "capi" / PROVIDER
    if not library.is_file():
        return ""
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        absent = ABSENT.match(str(error))
        return f", because {absent[1]} is missing" if absent else ""
    return ""
