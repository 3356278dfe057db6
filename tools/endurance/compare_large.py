"""Compare the artifact of the large model of sparse_model.py with that of the small one, and with float64.

    python -m endurance.compare_large LARGE SMALL native|stock

Both artifacts hold the same integers for the rows that they share. Exit code 1: a logit is not what it must be.
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

TOKENS = 24  # the last one alone, so that products of one row and of several are compared
TOLERANCE = 5e-5  # of the range, in float32; activations rounded to int8 differ by up to ROUNDED
ROUNDED = 5e-2


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


def main(large: str, small: str, kernels: str) -> int:
    """Print the largest differences and the peak memory."""
    # tokens from every run of rows, in small's numbers
    chosen = np.random.default_rng(1).permutation(len(ROWS))[None, :TOKENS].astype(np.int64)
    found = {}
    for name, float32 in (("float32", True), ("rounded", False)):
        runner: Any = h1export.load(large, kernels=kernels, float32=float32)
        whole = logits(runner, ROWS[chosen])
        del runner
        assert whole.shape == (TOKENS, VOCABULARY)
        others = np.ones(VOCABULARY, bool)
        others[ROWS] = False
        nonzero = int(np.count_nonzero(whole[:, others]))
        runner = h1export.load(small, kernels=kernels, float32=float32)
        same = logits(runner, chosen)
        if float32:
            truth = reference(Path(sys.argv[4]), runner.stored_weights(), chosen)
        span = truth.max() - truth.min()
        found[name] = (
            float(np.abs(whole[:, ROWS] - truth).max() / span),
            float(np.abs(whole[:, ROWS] - same).max() / span),
            nonzero,
        )
        del runner
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    for name, (exact, same, nonzero) in found.items():
        print(f"{name}: {exact:.1e} of the range from float64, {same:.1e} from the small model, {nonzero} logits not 0")
    print(f"peak memory {peak:.1f} GiB")
    limits = {"float32": TOLERANCE, "rounded": ROUNDED}
    return int(any(exact > limits[name] or same > 1e-6 or nonzero for name, (exact, same, nonzero) in found.items()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
