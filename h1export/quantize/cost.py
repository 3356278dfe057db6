"""The memory, disk space and time that a calibrated method needs, estimated from the model's shapes for a plan."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import ceil, prod
from time import perf_counter
from typing import Protocol

import torch

from h1export.checkpoint.store import WeightStore
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Ids
from h1export.model.falcon_h1.tensors import layer_prefix
from h1export.quantize.choices import GROUP_SIZES, Step
from h1export.quantize.layers import head_tensor, weights_by_input
from h1export.quantize.methods.awq import EXPONENTS, SEARCH_BYTES
from h1export.quantize.methods.descent import SWEEPS
from h1export.quantize.methods.gptq_model import WEIGHING
from h1export.quantize.methods.guard import held_out
from h1export.quantize.methods.head_groups import GROUPS, POSITIONS, SKETCH
from h1export.quantize.methods.solved_file import SOLVE_BYTES
from h1export.quantize.methods.tune import BATCH
from h1export.quantize.methods.tuned_values import STEPS
from h1export.quantize.scheme import QuantScheme

PRODUCT_SIZE = 768  # rows and columns of the product that is timed
PRODUCT_RUNS = 3  # of which the fastest counts
FIT_BYTES = (
    28  # of a coefficient in the equations for scales: in float32, and three times in float64 as they are solved
)
LEAST_GROUP = min(GROUP_SIZES)
TRY_COPIES = 6  # of a block of rows: weight, scaled, quotients, codes, dequantised, error
ROUNDING_FLOPS = 2000  # floating-point operations of a product that take as long as rounding one weight
PROBABILITY_COPIES = 3  # of a few positions' logits: exponents, probabilities, variances
STATE_COPIES = 3  # of a value that a step tunes: itself, and means of its gradients and of their squares
GRAPH_COPIES = 4  # of a layer's activations that its gradient needs
INVERSE_COPIES = 8  # of a matrix of moments in float64, while it is inverted
SOLVE_COPIES = 10  # of a block of rows: weight, wanted, rest, codes, what a search tries, both candidates


class Cost(Protocol):
    """The cost of a method on some tensors of a checkpoint, with calibration ids [samples, length]."""

    @property
    def disk_bytes(self) -> int:
        """Bytes of scratch files in the stage, beside those of the artifact."""
        ...

    def peak_bytes(self, jobs: int) -> int:
        """Returns the peak of anonymous memory with ``jobs`` threads, beyond what the process holds before."""
        ...

    def seconds(self, jobs: int) -> float:
        """Returns the time with ``jobs`` threads, from the measured speed of a matrix product on one thread."""
        ...


def cost_of(
    scheme: QuantScheme, store: WeightStore, config: FalconH1Config, *, tensors: Collection[str], ids: Ids
) -> Cost:
    """Returns the cost of a calibrated ``scheme`` that quantises ``tensors``: its method's, and that of the steps."""
    found: list[Cost] = []
    if scheme.base == "awq":
        found.append(_AwqCost(store, config, tensors, ids=ids))
    if scheme.base == "gptq":
        found.append(_GptqCost(store, config, tensors, ids=ids))
    if scheme.steps:
        found.append(_StepsCost(scheme.steps, store, config, tensors=tensors, ids=ids))
    return _Together(found)


@dataclass(frozen=True)
class _Together:
    """The cost of methods that run one after the other, and whose files stay."""

    parts: Sequence[Cost]

    @property
    def disk_bytes(self) -> int:
        return sum(part.disk_bytes for part in self.parts)

    def peak_bytes(self, jobs: int) -> int:
        return max(part.peak_bytes(jobs) for part in self.parts)

    def seconds(self, jobs: int) -> float:
        return sum(part.seconds(jobs) for part in self.parts)


class _Shapes:
    """The shapes of one layer's quantised projections, of their inputs, and of the head."""

    def __init__(self, store: WeightStore, config: FalconH1Config, tensors: Collection[str], *, ids: Ids) -> None:
        self._layers = config.num_hidden_layers
        self._hidden_size = config.hidden_size
        self._samples, self._length = map(int, ids.shape)
        groups = [group for group in weights_by_input(0).values() if group[0] in tensors]
        self._columns = [store.shape(group[0])[1] for group in groups]  # of each input
        self._projections = [store.shape(tensor) for group in groups for tensor in group]
        self._layer = sum(prod(entry.shape) for entry in store.entries if entry.name.startswith(layer_prefix(0)))
        self._head = store.shape(head_tensor(config))


class _GptqCost(_Shapes):
    @property
    def disk_bytes(self) -> int:
        """Codes, and the float and the quantised activations of two layers."""
        codes = self._layers * sum(map(prod, self._projections)) + prod(self._head)
        return codes + 4 * 4 * self._samples * self._length * self._hidden_size

    def peak_bytes(self, jobs: int) -> int:
        """Returns the largest of three phases: running a layer, solving its projections, and solving the head."""
        widest = max(self._columns, default=0)
        tokens = self._samples * self._length
        # Both residual streams, and the inputs of the weights before which the layer has stopped.
        stopped = 2 * 4 * tokens * (self._hidden_size + widest)
        weights = 2 * 4 * self._layer
        running = (jobs + 1) * 4 * self._length * (sum(self._columns) + 8 * self._hidden_size)
        solving_rows = max((_solving_bytes(*shape, jobs=jobs) for shape in self._projections), default=0)
        solving = INVERSE_COPIES * 8 * widest**2 + solving_rows
        rows, columns = self._head
        grouping = (jobs + 1) * 4 * rows * (PROBABILITY_COPIES * POSITIONS + SKETCH) + 2 * 4 * rows * GROUPS
        heavy = 3 * 2 * 4 * int(WEIGHING * tokens) * columns  # gathered, and weighted
        # Every thread has a group's.
        solving_groups = jobs * (INVERSE_COPIES * 8 * columns**2 + heavy) + _solving_bytes(rows, columns, jobs=jobs)
        judging = 4 * rows * (2 * columns + 4 * POSITIONS)  # a candidate and its codes, some positions' probabilities
        head = 5 * rows * columns + 2 * 4 * tokens * self._hidden_size + max(grouping, solving_groups, judging)
        return max(stopped + weights + max(running, solving), head)

    def seconds(self, jobs: int) -> float:
        tokens = self._samples * self._length
        # A layer runs twice, with its own weights and with integers; its mixers take a third of the time of products.
        forward = 2 * 4 / 3 * 2 * tokens * self._layer
        moments = sum(2 * 1.6 * tokens * columns**2 for columns in self._columns)  # one of the two is symmetric
        # An inverse has three steps, each of a third to two thirds of a product, in float64.
        inverses = sum(2 * 4 * columns**3 for columns in self._columns)
        # Correcting and rounding cost a product each, a fit two, and a sweep of the descent two.
        turns = 1 + 1 + 2 * 2 + 2 * SWEEPS
        rounding = sum(2 * turns * rows * columns**2 for rows, columns in self._projections)
        held = held_out(self._samples) * self._length
        judging = sum(3 * 2 * held * rows * columns for rows, columns in self._projections)
        layer = (forward + moments + rounding + judging) / jobs + inverses
        rows, columns = self._head
        logits = 2 * 2 * tokens * rows * (columns + SKETCH)
        groups = GROUPS * (2 * 1.6 * WEIGHING * tokens * columns**2 + 2 * 4 * columns**3)  # moments and inverse of each
        judging = 4 * 2 * held * rows * columns  # predictions of the full model beside those of two candidates
        head = (logits + groups + 2 * turns * rows * columns**2) / jobs + judging
        return (self._layers * layer + head) / _flops_per_second()


def _solving_bytes(rows: int, columns: int, *, jobs: int) -> int:
    """Returns the bytes of the blocks of rows of a weight that ``jobs`` threads solve at a time."""
    weight = 4 * rows * columns
    blocks = min(weight, min(jobs, ceil(weight / SOLVE_BYTES)) * SOLVE_BYTES)
    # The equations for the scales of a row have groups x groups coefficients.
    return blocks * SOLVE_COPIES + FIT_BYTES * blocks // 4 * columns // LEAST_GROUP**2


class _AwqCost(_Shapes):
    @property
    def disk_bytes(self) -> int:
        return 0

    def peak_bytes(self, jobs: int) -> int:
        """Returns the bytes of a layer, sequences and moments, and the larger of what running and searching need."""
        hidden = 4 * self._samples * self._length * self._hidden_size
        moments = 4 * sum(columns**2 for columns in self._columns) + 4 * max(self._columns, default=0) ** 2
        running = (jobs + 1) * 4 * self._length * (sum(self._columns) + 8 * self._hidden_size)
        searching = (jobs + 1) * TRY_COPIES * SEARCH_BYTES
        return 4 * self._layer + hidden + moments + max(running, searching)

    def seconds(self, jobs: int) -> float:
        tokens = self._samples * self._length
        forward = 2 * 2 * tokens * self._layer
        moments = sum(2 * tokens * columns**2 for columns in self._columns)
        tries = sum(self._flops_of_tries(rows, columns) for rows, columns in self._projections)
        layer = max(forward / jobs, moments) + tries / jobs
        rows, columns = self._head
        head = 2 * tokens * columns**2 + self._flops_of_tries(rows, columns) / jobs
        return (self._layers * layer + head) / _flops_per_second()

    def _flops_of_tries(self, rows: int, columns: int) -> int:
        return len(EXPONENTS) * rows * columns * (2 * columns + ROUNDING_FLOPS)


class _StepsCost(_Shapes):
    def __init__(
        self,
        steps: Sequence[Step],
        store: WeightStore,
        config: FalconH1Config,
        *,
        tensors: Collection[str],
        ids: Ids,
    ) -> None:
        super().__init__(store, config, tensors, ids=ids)
        self._steps = steps
        self._codes = self._layers * sum(map(prod, self._projections)) + prod(self._head)

    @property
    def disk_bytes(self) -> int:
        """Codes and scales after each step, and what one step saves to go on after a kill."""
        saved = max(STATE_COPIES * 4 * self._values(step) for step in self._steps)
        return len(self._steps) * (self._codes + 2 * self._codes // LEAST_GROUP) + saved

    def _values(self, step: Step) -> int:
        """Returns the number of values that ``step`` tunes, at most."""
        return self._codes if step == "round" else self._codes // LEAST_GROUP

    def peak_bytes(self, jobs: int) -> int:
        """Returns the bytes of integers, of a step's values, and the larger of what a layer and the head need."""
        values = max(2 * self._codes + 4 * STATE_COPIES * self._values(step) for step in self._steps)
        positions = 4 * self._length * self._hidden_size
        predictions = self._samples * positions
        inputs = BATCH * (self._layers + 2) * positions
        graph = GRAPH_COPIES * 4 * self._length * (sum(self._columns) + 8 * self._hidden_size)
        layer = 2 * 4 * self._layer + (jobs + 1) * (4 * self._layer + graph)
        rows, columns = self._head
        head = 4 * rows * (3 * columns + (jobs + 1) * (columns + PROBABILITY_COPIES * POSITIONS))
        return values + predictions + inputs + max(layer, head)

    def seconds(self, jobs: int) -> float:
        rows, columns = self._head
        # Of a layer: two runs, and a gradient that takes two more; mixers cost about as much as products, and their
        # reference is computed once more for the gradient. Of the head: two predictions and two products.
        token = self._layers * 2 * (2 * 4 + 1) * self._layer + 4 * 2 * rows * columns
        updates = sum(STEPS[step] for step in self._steps) * BATCH * self._length
        full = 2 * 2 * self._samples * self._length * self._layers * self._layer
        return (updates * token + full) / jobs / _flops_per_second()


def _flops_per_second() -> float:
    """Returns the floating-point operations a second of one thread in a float32 product."""
    threads = torch.get_num_threads()
    times = []
    matrix = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE)
    torch.set_num_threads(1)
    for _ in range(PRODUCT_RUNS):
        start = perf_counter()
        matrix @ matrix
        times.append(perf_counter() - start)
    torch.set_num_threads(threads)
    return 2 * PRODUCT_SIZE**3 / min(times)
