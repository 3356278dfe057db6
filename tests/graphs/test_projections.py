"""The µP multipliers of the table of projections are those that the passes fold."""

from __future__ import annotations

from typing import Any

import pytest

from h1export.checkpoint.weight_expr import Multiplier
from h1export.model.falcon_h1.projections import HEAD, LAYER_PROJECTIONS
from h1export.model.falcon_h1.tensors import EMBEDDING, layer_prefix


def test_multipliers_are_those_that_the_passes_fold(lab: Any) -> None:
    config = lab.config
    folded = {expr.only.tensor: expr.only.multiplier for expr in lab.passed.weights.values()}
    for layer in range(config.num_hidden_layers):
        for projection in LAYER_PROJECTIONS:
            output = Multiplier(projection.output_multiplier(config))
            if {factor for _, factor in output.runs} == {1.0}:
                output = Multiplier()  # ones are not in the graph
            rows = projection.rows(config)
            whole = Multiplier.scalar(projection.input_multiplier(config)).times(output)
            found = folded[layer_prefix(layer) + projection.weight]
            assert found.rows(rows) == pytest.approx(whole.rows(rows), rel=1e-6), projection.name
            if projection.has_bias(config):
                assert folded[layer_prefix(layer) + projection.bias].rows(rows) == pytest.approx(output.rows(rows))
    tied = config.tie_word_embeddings
    assert folded[EMBEDDING if tied else HEAD.weight] == Multiplier()
