"""Emitters read sizes from the nodes of the graph: a config with wrong sizes changes nothing in the ML program."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from h1export.artifact.stage import Stage
from h1export.checkpoint.store import WeightStore
from h1export.graphs.passes import run_passes
from h1export.graphs.program import Program
from h1export.graphs.trace import trace
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.scheme import QuantScheme
from h1export.quantize.source import Rounded
from h1export.targets.coreml.program import layout
from h1export.targets.coreml.program.blob_storage import BlobStorage
from h1export.targets.coreml.program.functions import mil_program
from h1export.targets.coreml.program.weights import Weights

WRONG = {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "mamba_n_heads": 5,
    "mamba_d_head": 1,
    "mamba_n_groups": 5,
    "mamba_d_state": 7,
}


def text(program: Program, config: FalconH1Config, checkpoint: Path, folder: Path) -> str:
    """Return the ML program of ``program`` as coremltools prints it, with the weights of ``checkpoint``."""
    (folder / layout.WEIGHTS).parent.mkdir(parents=True)
    store = WeightStore.open(checkpoint, config)
    with BlobStorage(Stage(folder), layout.WEIGHTS) as blobs:
        integers = Rounded(store, QuantScheme("int4").precisions(config), quantize_rows)
        weights = Weights(store, integers, config, blobs=blobs, compute=np.float16)
        made = mil_program(program, weights, layout.CALLS, max_context=64, state_io=False)
        printed = "\n".join(str(function) for function in made.functions.values())
        return re.sub(r"\bblock\d+", "block", printed)  # coremltools numbers the blocks of a process


def test_an_emitter_reads_no_size_from_the_config(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint("norm_after_gate_two_groups", num_hidden_layers=1)
    config = FalconH1Config.load(checkpoint)
    program = run_passes(trace(config))
    wrong = replace(program, config=replace(config, **WRONG))
    right, found = (
        text(each, config, checkpoint, tmp_path / name) for name, each in (("right", program), ("wrong", wrong))
    )
    assert "scaled_dot_product_attention" in right
    assert found == right
