"""The memory bandwidth limit: the bytes that a decode step must read, and how fast this machine reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from h1export.artifact.manifest import Manifest
from h1export.artifact.state_bytes import state_bytes
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateSpec
from h1export.model.falcon_h1.tensors import EMBEDDING, tensor_shapes
from h1export.quantize.precision import Precision

FLOAT_BYTES = 4  # of a value that is not quantised
READS = 5  # in a turn
QUIET = 0.8  # of the fastest read, by the median of all, on a machine that does nothing else
READ_BYTES = 1 << 28  # of the array that read_bandwidth reads: far larger than any last-level cache


def step_bytes(manifest: Manifest, config: FalconH1Config, batch: int, depth: int) -> int:  # noqa: PLR0917  a callback
    """Return the bytes that one decode step of ``batch`` sequences reads after ``depth`` tokens.

    It reads every weight and state once, but of an untied embedding one row a sequence. Activations stay in caches
    and do not count, nor do writes of states.
    """
    _, weights = manifest.files[manifest.weights_file]
    if not config.tie_word_embeddings:
        row = _row_bytes(manifest, config)
        weights -= (config.vocab_size - batch) * row
    return weights + state_bytes(manifest, config, depth, batch=batch)


def float_bytes(config: FalconH1Config) -> int:
    """Return the bytes of all weights in float32."""
    return FLOAT_BYTES * sum(prod(shape) for shape in tensor_shapes(config).values())


def float_step_bytes(config: FalconH1Config, batch: int, depth: int) -> int:
    """Return ``step_bytes`` of a model that holds float32 weights."""
    unread = 0 if config.tie_word_embeddings else (config.vocab_size - batch) * FLOAT_BYTES * config.hidden_size
    return float_bytes(config) - unread + StateSpec.of(config).nbytes(batch, depth)


def _row_bytes(manifest: Manifest, config: FalconH1Config) -> int:
    """Return the bytes of a row of the embedding in the artifact: codes and one scale a group, or float32.

    A target may repeat an int8 row's scale; repetitions are not counted, and are half a percent of the model at most.
    """
    columns = config.hidden_size
    for weight in manifest.weights:
        if any(part.tensor == EMBEDDING for part in weight.parts):
            return Precision(weight.bits, weight.group_size).stored_bits((1, columns)) // 8
    return FLOAT_BYTES * columns


@dataclass(frozen=True)
class Bandwidth:
    """How fast one thread count reads memory, in bytes a second.

    What else runs on a machine can only slow a read down, so the fastest one counts.

    Attributes:
        best: the fastest of all reads, those of decode steps among them: no share of it is above 1.
        read: the fastest of the reads that were made to measure it; a decode step beats it where its weights lie in a
            cache, or where every one of these reads was disturbed.
        typical: the median of those reads.
        reads: how many they were.
    """

    best: float
    read: float
    typical: float
    reads: int

    @classmethod
    def of(cls, reads: Sequence[float], decodes: Iterable[float] = ()) -> Bandwidth:
        """Return what ``reads`` say, at least one, and the bytes a second that ``decodes`` have read."""
        fastest = max(reads)
        return cls(max(fastest, *decodes, 0.0), fastest, float(np.median(reads)), len(reads))

    @property
    def is_quiet(self) -> bool:
        """Whether nothing else slowed most of the reads down, nor all of them as far as decode steps can tell."""
        return self.typical >= QUIET * self.best


class Turn:
    """Reads of memory, READS at a time: called, it makes them and returns the fastest.

    Attributes:
        reads: the bandwidth of each, in bytes a second.
    """

    def __init__(self, threads: int) -> None:
        self._read = read_bandwidth(threads)
        self.reads: list[float] = []

    def __call__(self) -> float:
        self.reads += [self._read() for _ in range(READS)]
        return max(self.reads[-READS:])


def read_bandwidth(threads: int) -> Callable[[], float]:
    """Return a measurement of the read bandwidth in bytes a second.

    Each of ``threads`` threads takes the maximum of its own part of one large array.
    NumPy releases the interpreter lock meanwhile, and compares in vectors far faster than any memory delivers.
    """
    array = np.ones(READ_BYTES // 4, np.uint32)  # ones, so that every page is allocated and not the shared zero page
    parts: list[npt.NDArray[np.uint32]] = np.array_split(array, threads)
    pool = ThreadPoolExecutor(threads)

    def measure() -> float:
        start = time.perf_counter()
        list(pool.map(np.max, parts))
        return READ_BYTES / (time.perf_counter() - start)

    return measure
