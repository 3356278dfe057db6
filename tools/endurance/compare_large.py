"""Compare the artifact of the large model of sparse_model.py with that of the small one, and with float64.

    python -m endurance.compare_large LARGE SMALL native|stock CHECKPOINT

Both artifacts hold the same integers for the rows that they share; CHECKPOINT is the small model's. Exit code 1: a
logit is not what it must be.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import FalconH1ForCausalLM

import h1export
from endurance.sparse_model import ROWS, VOCABULARY
from h1export.errors import H1ExportError

TOKENS = 24  # the last one alone, so that products of one row and of several are compared
TOLERANCES = {"float32": 5e-5, "rounded": 5e-2}  # of the range
SAME = 1e-6


def reference(checkpoint: Path, weights: Any, ids: Any) -> Any:
    """Return transformers' logits [tokens, rows] in float64, with the dequantised integers of the small artifact."""
    model: Any = FalconH1ForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in weights:
            parameters[name].copy_(torch.from_numpy(weights[name]))
        return model(torch.from_numpy(ids)).logits[0].numpy()


def logits(runner: Any, ids: Any) -> Any:
    """Return the logits [tokens, vocabulary] of a prompt and a last token."""
    session = runner.start(1, ids.shape[1])
    return np.concatenate([session.append(ids[:, :-1])[0], session.append(ids[:, -1:])[0]])


def compared(large: str, small: str, kernels: Any, *, checkpoint: str) -> int:
    """Print the largest differences and the peak memory; return the exit code."""
    # tokens from every run of rows, in small's numbers
    chosen = np.random.default_rng(1).permutation(len(ROWS))[None, :TOKENS].astype(np.int64)
    others = np.ones(VOCABULARY, bool)
    others[ROWS] = False
    truth: Any = None
    right = True
    for name, float32 in (("float32", True), ("rounded", False)):
        try:
            runner: Any = h1export.load(large, 2, float32=float32, kernels=kernels)
        except H1ExportError as error:
            print(f"{name}: refused in one line: {error}")
            continue
        whole = logits(runner, ROWS[chosen])
        assert whole.shape == (TOKENS, VOCABULARY)
        runner = h1export.load(small, 2, float32=float32, kernels=kernels)
        same = logits(runner, chosen)
        truth = reference(Path(checkpoint), runner.stored_weights(), chosen) if truth is None else truth
        span = np.ptp(truth)
        from_truth, from_small, from_zero = (
            float(np.abs(difference).max() / span)
            for difference in (whole[:, ROWS] - truth, whole[:, ROWS] - same, whole[:, others])
        )
        print(
            f"{name}: {from_truth:.1e} of the range from float64, {from_small:.1e} from the small model, "
            f"rows of zeros within {from_zero:.1e}"
        )
        right &= from_truth <= TOLERANCES[name] and from_small <= SAME and from_zero <= SAME
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.1f} GiB")
    return int(not right)


if __name__ == "__main__":
    sys.exit(compared(*sys.argv[1:4], checkpoint=sys.argv[4]))
