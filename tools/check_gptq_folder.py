"""Load an artifact of --target gptq with GPTQModel on a CPU, and compare what it makes of it with what we wrote.

    pip install gptqmodel==7.7.0 && OMP_NUM_THREADS=1 python tools/check_gptq_folder.py OUT

It prints a line, and exits with 1 where a weight that GPTQModel dequantises differs from the artifact's in one bit, a
module is packed for one and not for the other, or its logits in fp16 are further off than fp16 explains. docs/gptq.md
has the figures of the folders that were checked so. GPTQModel's dependencies are too many for an extra of h1export.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.runtime.runner import Inspectable

LENGTH = 48
TOLERANCE = 5e-3  # of the range of the logits


def different_weights(model: Any, runner: Inspectable[Any]) -> list[str]:
    """Return the names of packed weights that differ, or that only one side has in integers."""
    stored = runner.stored_weights()
    found = set()
    different = []
    for module_name, module in model.named_modules():
        if not hasattr(module, "qweight"):
            continue
        name = f"{module_name}.weight"
        found.add(name)
        scales = module.scales
        module.scales = scales.float()  # so that the product is exact
        if name not in stored or not np.array_equal(module.dequantize_weight().T.numpy(), stored[name]):
            different.append(name)
        module.scales = scales
    return sorted({*different, *(found ^ set(stored))})


def error_of_logits(model: Any, runner: Inspectable[Any]) -> float:
    """Return the largest difference to the runner's float32 logits, over their range."""
    ids = np.random.default_rng(0).integers(0, runner.config.vocab_size, (1, LENGTH))
    with torch.no_grad():
        found = model(torch.from_numpy(ids)).logits[0].float().numpy()
    truth = runner.step(ids, np.ones_like(ids), runner.initial(1))[0][0]
    return float(np.abs(found - truth).max() / np.ptp(truth))


def main() -> int:
    """Check the artifact that is named on the command line."""
    os.cpu_count = lambda: 8  # GPTQModel refuses to share fewer among its pools of threads
    from gptqmodel import BACKEND, GPTQModel, __version__

    runner = load_runner(Artifact.open(Path(sys.argv[1])))
    options = {"device": "cpu", "backend": BACKEND.TORCH, "dtype": torch.float16, "attn_implementation": "eager"}
    loaded: Any = GPTQModel.load(sys.argv[1], **options)
    different = different_weights(loaded.model, runner)
    error = error_of_logits(loaded.model, runner)
    count = len(runner.stored_weights())
    print(
        f"GPTQModel {__version__}: {count - len(different)} of {count} weights equal, logits {error:.1e} of the range"
    )
    return int(bool(different) or not error <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
