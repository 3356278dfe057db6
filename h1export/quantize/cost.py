"""What a method that looks at a text needs, from the model's shapes: for a plan."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from time import perf_counter
from typing import Protocol

import torch

from h1export.checkpoint.store import WeightStore
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.quantize.layers import head_tensor, prefix, products
from h1export.quantize.methods.awq import EXPONENTS, SEARCH_BYTES
from h1export.quantize.methods.gptq import ROUNDS
from h1export.quantize.methods.gptq_model import SOLVE_BYTES
from h1export.quantize.methods.head_groups import GROUPS, POSITIONS, SKETCH
from h1export.quantize.scheme import GROUP_SIZES, Method
from h1export.runtime.runner import Ids

# rows and columns of the products that are timed
SAMPLE = 768
SAMPLES = 3
# the equations for scales, in float32 and in float64
FIT_BYTES = 12
LEAST_BLOCK = min(GROUP_SIZES)
TRY_COPIES = 6  # of a block of rows: weight, scaled, quotients, codes, dequantised, error
ROUNDING_FLOPS = 2000  # of a product that take as long as rounding a weight does
PROBABILITY_COPIES = 3  # of a few positions' logits: exponents, probabilities, variances
SOLVE_COPIES = 4  # of a block of rows: weight, rest, scales by search, codes


class Cost(Protocol):
    """Of a method on ``tensors`` of a checkpoint with calibration ids [samples, length]."""

    @property
    def disk_bytes(self) -> int:
        """Of the stage while it works, beyond the artifact's own."""
        ...

    def peak_bytes(self, jobs: int) -> int:
        """Anonymous memory at its peak, above what the process holds before."""
        ...

    def seconds(self, jobs: int) -> float:
        """Of ``jobs`` threads, from a matrix product's speed on one of this machine's."""
        ...


def cost_of(method: Method, store: WeightStore, config: FalconH1Config, *, tensors: Collection[str], ids: Ids) -> Cost:
    """That of ``method``, which looks at a text."""
    return (_Scaling if method == "awq" else _Solving)(store, config, tensors, ids)


class _Shapes:
    def __init__(self, store: WeightStore, config: FalconH1Config, tensors: Collection[str], ids: Ids) -> None:
        self._store = store
        self._spec = config
        self._samples, self._length = map(int, ids.shape)
        first = [group for group in products(0).values() if group[0] in tensors]
        self._columns = [store.shape(group[0])[1] for group in first]
        self._layer = sum(prod(entry.shape) for entry in store.entries if entry.name.startswith(prefix(0)))
        self._solved = [store.shape(tensor) for group in first for tensor in group]
        self._head = store.shape(head_tensor(config))


class _Solving(_Shapes):
    @property
    def disk_bytes(self) -> int:
        """Integers, and both sequences, right and wrong, before a layer and after it."""
        codes = self._spec.num_hidden_layers * sum(map(prod, self._solved)) + prod(self._head)
        return codes + 4 * 4 * self._samples * self._length * self._spec.hidden_size

    def peak_bytes(self, jobs: int) -> int:
        """A layer, its moments, and what each thread has at hand."""
        widest = max(self._columns, default=0)
        moments = 2 * 8 * sum(columns**2 for columns in self._columns)
        inverting = 6 * 8 * widest**2
        sequences = (jobs + 1) * 2 * 4 * self._length * (sum(self._columns) + 8 * self._spec.hidden_size)
        fitting = (
            FIT_BYTES * SOLVE_BYTES // 4 * widest // LEAST_BLOCK**2
        )  # for each of the rows at hand, blocks times blocks
        solving = (jobs + 1) * (SOLVE_COPIES * SOLVE_BYTES + fitting)
        rows, columns = self._head
        contexts = (jobs + 1) * 4 * rows * (PROBABILITY_COPIES * POSITIONS + SKETCH) + 2 * 4 * rows * GROUPS
        groups = (jobs + 1) * (
            8 * 8 * columns**2 + SOLVE_COPIES * SOLVE_BYTES + fitting
        )  # each thread has a group's moments
        head = 5 * rows * columns + max(contexts, groups)
        return max(4 * self._layer + sequences + moments + 2 * 4 * widest**2, moments + inverting + solving, head)

    def seconds(self, jobs: int) -> float:
        tokens = self._samples * self._length
        forward = (
            3 * 2 * 2 * tokens * self._layer
        )  # three runs of a layer; the mixers cost about as much as its products
        moments = sum(2 * 2 * tokens * columns**2 for columns in self._columns)  # on one thread, beside the runs
        inverses = sum(
            2 * 4 * columns**3 for columns in self._columns
        )  # three steps of a third to two thirds each, a product, in float64
        turns = 2 + 2 * ROUNDS + 2  # correcting, rounding and fitting cost about the same; a fit has two products
        rounding = sum(2 * turns * rows * columns**2 for rows, columns in self._solved)
        rows, columns = self._head
        logits = 2 * 2 * tokens * rows * (columns + SKETCH)  # computed twice
        groups = GROUPS * (2 * 2 * tokens * columns**2 + 2 * 4 * columns**3)  # moments and inverses of each
        head = logits + groups + 2 * turns * rows * columns**2
        total = (
            self._spec.num_hidden_layers * (max(forward / jobs, moments) + (inverses + rounding) / jobs) + head / jobs
        )
        return total / _flops()


class _Scaling(_Shapes):
    @property
    def disk_bytes(self) -> int:
        return 0

    def peak_bytes(self, jobs: int) -> int:
        """A layer, the sequences, and moments or what each thread has at hand."""
        hidden = 4 * self._samples * self._length * self._spec.hidden_size
        inputs = (jobs + 1) * 4 * self._length * (sum(self._columns) + 8 * self._spec.hidden_size)
        moments = 4 * sum(columns**2 for columns in self._columns) + 4 * max(self._columns, default=0) ** 2
        return 4 * self._layer + hidden + moments + max(inputs, (jobs + 1) * TRY_COPIES * SEARCH_BYTES)

    def seconds(self, jobs: int) -> float:
        tokens = self._samples * self._length
        forward = 2 * 2 * tokens * self._layer
        moments = sum(2 * tokens * columns**2 for columns in self._columns)
        tries = len(EXPONENTS) * sum(rows * columns * (2 * columns + ROUNDING_FLOPS) for rows, columns in self._solved)
        rows, columns = self._head
        head = 2 * tokens * columns**2 + len(EXPONENTS) * rows * columns * (2 * columns + ROUNDING_FLOPS) / jobs
        return (self._spec.num_hidden_layers * (max(forward / jobs, moments) + tries / jobs) + head) / _flops()


def _flops() -> float:
    """Operations a second of one thread in a float32 product."""
    threads = torch.get_num_threads()
    times = []
    matrix = torch.ones(SAMPLE, SAMPLE)
    torch.set_num_threads(1)
    for _ in range(SAMPLES):
        start = perf_counter()
        matrix @ matrix
        times.append(perf_counter() - start)
    torch.set_num_threads(threads)
    return 2 * SAMPLE**3 / min(times)
