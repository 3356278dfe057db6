"""Sensitivities: those of transformers with one tensor replaced, on any number of threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from h1export.checkpoint.store import WeightStore
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Ids
from h1export.model.falcon_h1.tensors import EMBEDDING
from h1export.progress import SILENT
from h1export.quantize.budget import Sensitivity
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.scheme import QuantScheme
from h1export.quantize.sensitivity import sensitivities
from h1export.quantize.source import Rounded
from h1export.validate.accuracy.logits import logit_figures
from h1export.validate.accuracy.reference import Reference


def measured(checkpoint: Path, jobs: int = 1) -> tuple[Rounded, Ids, dict[str, Sensitivity]]:
    config = FalconH1Config.load(checkpoint)
    rounded = Rounded(WeightStore.open(checkpoint, config), QuantScheme().precisions(config), quantize_rows)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 150))
    return rounded, ids, sensitivities(rounded.store, config, rounded, ids=ids, jobs=jobs, progress=SILENT)


def test_they_are_those_of_transformers(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = make_checkpoint("norm_after_gate_two_groups")
    rounded, ids, found = measured(checkpoint)
    reference = Reference(checkpoint)
    truths = [reference.full(sample)[0] for sample in ids]
    assert found.keys() == rounded.precisions.keys() - {EMBEDDING}
    for name in (
        "model.layers.0.mamba.in_proj.weight",
        "model.layers.1.feed_forward.down_proj.weight",
        "lm_head.weight",
    ):
        rows = rounded.store.shape(name)[0]
        reference.hold({name: rounded.rows(name, 0, rows).unfolded()})
        pairs = [(reference.full(sample)[0], truth) for sample, truth in zip(ids, truths, strict=True)]
        assert found[name].kl == pytest.approx(logit_figures(pairs)["kl"], rel=1e-3)
        reference.hold({name: rounded.store.rows(name, 0, rows)})


def test_a_tied_head_is_judged_as_both_of_its_uses(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = make_checkpoint("tied", num_hidden_layers=1)
    rounded, ids, found = measured(checkpoint)
    reference = Reference(checkpoint)
    truths = [reference.full(sample)[0] for sample in ids]
    reference.hold({EMBEDDING: rounded.rows(EMBEDDING, 0, rounded.store.shape(EMBEDDING)[0]).unfolded()})
    pairs = [(reference.full(sample)[0], truth) for sample, truth in zip(ids, truths, strict=True)]
    assert found[EMBEDDING].kl == pytest.approx(logit_figures(pairs)["kl"], rel=1e-3)


def test_threads_change_no_digit(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = make_checkpoint("tied", num_hidden_layers=1)
    assert measured(checkpoint, 1)[2] == measured(checkpoint, 3)[2]
