"""Calls that run a layer on a sequence, in the form that WeightFile.write takes.

Each returns a block of rows for each extent that is written. They copy sequences that are mapped from a file, because
torch takes no array that is read-only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from h1export.checkpoint.store import WeightStore
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array, Ids
from h1export.quantize.layers import embed
from h1export.quantize.methods.head_groups import InputPair

# Name of an input -> its value [length, columns].
Inputs = Mapping[str, Tensor]
# A layer's input [length, hidden] -> its output [length, hidden], and the inputs of its projections.
RunLayer = Callable[[Array], tuple[Array, Inputs]]


class LayerRuns(NamedTuple):
    """A layer with the checkpoint's weights, run on both inputs of one sequence.

    Attributes:
        output: the layer's output for the float input, [length, hidden].
        float_inputs: the inputs of the layer's projections, for the float input.
        quantised_inputs: the same for the quantised input; empty where they are not needed.
    """

    output: Array
    float_inputs: Inputs
    quantised_inputs: Inputs


def embedded(store: WeightStore, config: FalconH1Config, ids: Ids) -> tuple[Array, Array]:
    """Returns a sequence's embeddings twice: layer 0 has the same float and quantised input."""
    hidden = embed(store, config, ids)
    return hidden, hidden


def run_on_both(run: RunLayer, float_input: Array, quantised_input: Array | None) -> LayerRuns:
    """Run a layer on a sequence's float input, and on its quantised input where one is given."""
    output, float_inputs = run(np.array(float_input))
    quantised_inputs: Inputs = {} if quantised_input is None else run(np.array(quantised_input))[1]
    return LayerRuns(output, float_inputs, quantised_inputs)


def layer_output(output_of: Callable[[Array], Array], sequence: Array) -> tuple[Array]:
    """Returns a layer's output for a sequence, as a block of one extent."""
    return (output_of(np.array(sequence)),)


def normed_pair(norm: Callable[[Array], Tensor], float_output: Array, quantised_output: Array) -> InputPair:
    """Returns the head's two inputs for the last layer's two outputs."""
    return norm(np.array(float_output)), norm(np.array(quantised_output))


def same_pair(pair: InputPair) -> InputPair:
    """Returns the head's two inputs, which are computed already."""
    return pair


def one_block(block: Array) -> tuple[Array]:
    """Returns a block that is computed already, for one extent."""
    return (block,)
