"""Record small prequantized weights that AutoAWQ wrote, with its own dequantisation, for the tests.

    pip install --no-deps autoawq==0.2.9 && python tools/record_packed.py

Only two of its source files are loaded: the package as a whole needs an older transformers than h1export does.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

OUT = Path(__file__).parent.parent / "tests" / "checkpoint" / "packed"
GROUP = 32


def load(root: str, name: str) -> Any:
    """Load one file of the installed package, without its __init__."""
    file = Path(root, *name.split(".")[1:]).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[name] = module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def main() -> None:
    """Write one file with zero points and one without."""
    (root,) = importlib.util.find_spec("awq").submodule_search_locations  # type: ignore[union-attr]
    for package in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        sys.modules.setdefault(package, types.ModuleType(package))
    packing = load(root, "awq.utils.packing_utils")
    load(root, "awq.utils.module")
    load(root, "awq.utils.utils")
    gemm = load(root, "awq.modules.linear.gemm")
    OUT.mkdir(exist_ok=True)
    for name, asymmetric in (("asymmetric", True), ("symmetric", False)):
        torch.manual_seed(1)
        linear = torch.nn.Linear(96, 64, bias=False)
        groups = linear.weight.detach().reshape(64, -1, GROUP)
        if asymmetric:
            low, high = groups.amin(2), groups.amax(2)
            scales = ((high - low) / 15).half().float()
            zeros = (-torch.round(low / scales)).clamp(0, 15)
        else:
            scales = (groups.abs().amax(2) / 7).half().float()
            zeros = torch.full_like(scales, 8)
        layer = gemm.WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scales.T, zeros=zeros.T)
        stored = {"qweight": layer.qweight, "qzeros": layer.qzeros, "scales": layer.scales}
        dequantised = packing.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, GROUP).T
        tensors = {f"x.{part}": tensor.contiguous() for part, tensor in stored.items()}
        save_file(tensors | {"dequantised": dequantised.contiguous()}, OUT / f"autoawq-{name}.safetensors")


if __name__ == "__main__":
    main()
