"""What an SSM head loses where its recurrent state is stored in fewer bits between tokens.

    python benchmarks/state_bits.py --tokens 20000

One head of 64 channels and 128 state columns, S = decay S + B x, y = C S, with random inputs that keep the state's
size: in float64, and with the state rounded to nearest after each token. Printed is the largest error of any output
that was looked at, every 200th token, relative to the largest output.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

HEAD_DIM, STATE = 64, 128
RATES = (1e-2, 1e-3, 1e-4)  # of decay a token
EVERY = 200

Floats = npt.NDArray[np.float32]


def in_24_bits(state: Floats) -> Floats:
    """Return float32 rounded to 15 bits of mantissa, to nearest and ties to even."""
    dropped = 23 - 15
    bits = state.view(np.uint32)
    half = np.uint32((1 << (dropped - 1)) - 1) + ((bits >> np.uint32(dropped)) & np.uint32(1))
    return ((bits + half) & ~np.uint32((1 << dropped) - 1)).view(np.float32)


STORED: Mapping[str, Callable[[Floats], Floats]] = {
    "float32": lambda state: state,
    "24 bits": in_24_bits,
    "float16": lambda state: state.astype(np.float16).astype(np.float32),
    "bfloat16": lambda state: state.astype(ml_dtypes.bfloat16).astype(np.float32),
}


def errors(rate: float, tokens: int) -> dict[str, float]:
    """Return the largest relative error of the outputs for every way to store the state."""
    rng = np.random.default_rng(0)
    decay = np.float32(np.exp(-rate))
    exact = np.zeros((STATE, HEAD_DIM))
    states = {name: np.zeros((STATE, HEAD_DIM), np.float32) for name in STORED}
    worst = dict.fromkeys(STORED, 0.0)
    largest = 0.0
    for token in range(1, tokens + 1):
        B, x, C = (rng.standard_normal(size).astype(np.float32) for size in (STATE, HEAD_DIM, STATE))
        drive = np.outer(B, x * np.float32(np.sqrt(rate / STATE)))
        exact = float(decay) * exact + drive
        for name, rounded in STORED.items():
            states[name] = rounded(decay * states[name] + drive)
        if token % EVERY == 0:
            y = C @ exact
            largest = max(largest, float(np.abs(y).max()))
            for name, state in states.items():
                worst[name] = max(worst[name], float(np.abs(C @ state.astype(np.float64) - y).max()))
    return {name: error / largest for name, error in worst.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000)
    args = parser.parse_args()
    table = Table("decay of a token", *STORED)
    for rate in RATES:
        table.add_row(f"exp(-{rate:g})", *(f"{error:.1e}" for error in errors(rate, args.tokens).values()))
    Console().print(table)


if __name__ == "__main__":
    main()
