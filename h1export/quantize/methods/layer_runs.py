"""Calls that run a layer on a sequence, in the form that WeightFile.write takes.

Each returns a block of rows for each extent that is written. They copy sequences that are mapped from a file, because
torch takes no array that is read-only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from h1export.checkpoint.store import WeightStore
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array, Ids
from h1export.quantize.layers import embed
from h1export.quantize.methods.moments import InputPair
from h1export.quantize.methods.staged_layer import StagedLayer, Stopped

Stops = tuple[Stopped, Stopped]  # with the checkpoint's weights, and with integers


def embedded(store: WeightStore, config: FalconH1Config, ids: Ids) -> tuple[Array, Array]:
    """Returns a sequence's embeddings twice: layer 0 has the same float and quantised input."""
    hidden = embed(store, config, ids)
    return hidden, hidden


def started(right: StagedLayer, found: StagedLayer, inputs: tuple[Array, Array]) -> Stops:
    """Returns the first stops of a layer, with the checkpoint's weights and with integers, on inputs from the file."""
    float_input, quantised_input = (torch.from_numpy(np.array(values)) for values in inputs)
    return right.start(float_input), found.start(quantised_input)


def advance(right: StagedLayer, found: StagedLayer, stop: int, *, at: Stops) -> Stops:
    """Returns the stops after ``at``, as StagedLayer.run does."""
    return right.run(stop, at[0]), found.run(stop, at[1])


def outputs(at: Stops, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Returns a layer's two outputs at its end, in ``shape``, as a block of two extents."""
    float_output, quantised_output = (one.residual.reshape(shape).cpu().numpy() for one in at)
    return float_output, quantised_output


def normed_pair(norm: Callable[[Array], Tensor], float_output: Array, quantised_output: Array) -> InputPair:
    """Returns the head's two inputs for the last layer's two outputs."""
    return norm(np.array(float_output)), norm(np.array(quantised_output))


def same_pair(pair: InputPair) -> InputPair:
    """Returns the head's two inputs, which are computed already."""
    return pair
