"""The memory limit: how many bytes a decode step must read, and how fast this machine reads."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np
import numpy.typing as npt

from h1export.artifact.manifest import Manifest
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateSpec
from h1export.model.falcon_h1.tensors import EMBEDDING, tensor_layout
from h1export.quantize.precision import Precision

FLOAT_BYTES = 4  # of a value that is not quantised
READ_BYTES = 1 << 28  # the array that read_bandwidth reads: far beyond any last-level cache


def step_bytes(manifest: Manifest, config: FalconH1Config, batch: int, depth: int) -> int:
    """Bytes that one decode step of ``batch`` sequences reads after ``depth`` tokens: every weight once, every state once.

    Of an untied embedding it reads a row a sequence. Activations stay in caches and do not count, nor do the states' writes.
    """
    weights = max(size for _, size in manifest.files.values())  # the largest file of an artifact holds them
    if not config.tie_word_embeddings:
        row = _row_bytes(manifest, config)
        weights -= (config.vocab_size - batch) * row
    return weights + StateSpec.of(config).nbytes(batch, depth)


def float_bytes(config: FalconH1Config) -> int:
    """Bytes of all weights in float32."""
    return FLOAT_BYTES * sum(prod(shape) for shape in tensor_layout(config).values())


def float_step_bytes(config: FalconH1Config, batch: int, depth: int) -> int:
    """``step_bytes`` of a model that holds float32 weights."""
    unread = 0 if config.tie_word_embeddings else (config.vocab_size - batch) * FLOAT_BYTES * config.hidden_size
    return float_bytes(config) - unread + StateSpec.of(config).nbytes(batch, depth)


def _row_bytes(manifest: Manifest, config: FalconH1Config) -> int:
    """What the artifact stores for a row of the embedding: codes and one scale a block, or float32.

    A target may repeat an int8 row's scale, which is not counted: half a percent of the model at most.
    """
    columns = config.hidden_size
    for weight in manifest.weights:
        if any(part.tensor == EMBEDDING for part in weight.parts):
            return Precision(weight.bits, weight.group_size).stored_bits((1, columns)) // 8
    return FLOAT_BYTES * columns


def read_bandwidth(threads: int) -> Callable[[], float]:
    """A measurement: bytes a second at which ``threads`` threads take the maximum of one large array, each of its own part.

    NumPy lets other threads run meanwhile, and compares in vectors far faster than any memory delivers.
    """
    array = np.ones(READ_BYTES // 4, np.uint32)  # written once, so that every page is its own and not the zero page
    parts: list[npt.NDArray[np.uint32]] = np.array_split(array, threads)
    pool = ThreadPoolExecutor(threads)

    def measure() -> float:
        start = time.perf_counter()
        list(pool.map(np.max, parts))
        return READ_BYTES / (time.perf_counter() - start)

    return measure
