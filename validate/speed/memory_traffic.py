"""The memory limit: how many bytes a decode step must read, and how fast this machine reads."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np
import numpy.typing as npt

from h1export.artifact.artifact import Manifest
from h1export.model.falcon_h1.config import HybridSpec
from h1export.model.falcon_h1.states import StateSpec
from h1export.model.falcon_h1.tensors import EMBEDDING, tensor_layout

FLOAT_BYTES, SCALE_BYTES = 4, 2  # of a value that is not quantised, and of a scale
READ_BYTES = 1 << 28  # the array that read_bandwidth reads: far beyond any last-level cache


def step_bytes(manifest: Manifest, spec: HybridSpec, batch: int, depth: int) -> int:
    """Bytes that one decode step of ``batch`` sequences reads after ``depth`` tokens: every weight once, every state once.

    Of an untied embedding it reads a row a sequence. Activations stay in caches and do not count, nor do the states' writes.
    """
    weights = max(size for _, size in manifest.files.values())  # the largest file of an artifact holds them
    if not spec.tie_word_embeddings:
        row = _row_bytes(manifest, spec)
        weights -= (spec.vocab_size - batch) * row
    return weights + StateSpec.of(spec).nbytes(batch, depth)


def float_bytes(spec: HybridSpec) -> int:
    """Bytes of all weights in float32."""
    return FLOAT_BYTES * sum(prod(shape) for shape in tensor_layout(spec).values())


def float_step_bytes(spec: HybridSpec, batch: int, depth: int) -> int:
    """``step_bytes`` of a model that holds float32 weights."""
    unread = 0 if spec.tie_word_embeddings else (spec.vocab_size - batch) * FLOAT_BYTES * spec.hidden_size
    return float_bytes(spec) - unread + StateSpec.of(spec).nbytes(batch, depth)


def _row_bytes(manifest: Manifest, spec: HybridSpec) -> int:
    """What the artifact stores for a row of the embedding: codes and one scale a block, or float32.

    A target may repeat an int8 row's scale, which is not counted: half a percent of the model at most.
    """
    columns = spec.hidden_size
    for weight in manifest.weights:
        if any(part.tensor == EMBEDDING for part in weight.parts):
            return columns * weight.bits // 8 + SCALE_BYTES * (-(-columns // weight.block) if weight.block else 1)
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
