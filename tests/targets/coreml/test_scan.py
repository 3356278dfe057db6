"""The scan alone, over thousands of steps: slow heads must not drift, although Core ML's states are fp16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - it registers bfloat16 with NumPy, which safetensors looks up
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from h1export.artifact.stage import Stage
from h1export.checkpoint.store import WeightStore
from h1export.graphs.passes import run_passes
from h1export.graphs.trace import trace
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateKind
from h1export.plugins import h1
from h1export.progress import SILENT
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.scheme import QuantScheme
from h1export.quantize.source import Rounded
from h1export.targets.coreml import sdk
from h1export.targets.coreml.evaluator import Evaluator, Package
from h1export.targets.coreml.package import writer
from h1export.targets.coreml.program import layout
from h1export.targets.coreml.program.blob_storage import BlobStorage
from h1export.targets.coreml.program.context import ALL_REAL, Context
from h1export.targets.coreml.program.layout import DECODE, LOW, LOW_SCALE, PREFILL, Call
from h1export.targets.coreml.program.ops import TABLE
from h1export.targets.coreml.program.states import HeldStates
from h1export.targets.coreml.program.weights import Weights

STEPS = 2000
INPUTS = {"x": 0, "dt": 1, "B": 3, "C": 4}  # name -> argument of h1::ssm_scan

Arrays = dict[str, Any]


@pytest.fixture(scope="module")
def slow(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer whose heads forget over 1e2 to 1e5 tokens."""
    folder = tmp_path_factory.mktemp("slow")
    source = make_checkpoint("norm_after_gate_two_groups", num_hidden_layers=1)
    tensors = load_file(source / "model.safetensors")
    heads = len(tensors["model.layers.0.mamba.A_log"])
    tensors["model.layers.0.mamba.A_log"] = np.zeros(heads, np.float32)
    tensors["model.layers.0.mamba.dt_bias"] = np.log(np.expm1(np.logspace(-5, -2, heads))).astype(np.float32)
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


def scan_package(checkpoint: Path, folder: Path, call: Call) -> Evaluator:
    """Return a package with the scan of the model's only layer."""
    config = FalconH1Config.load(checkpoint)
    program = run_passes(trace(config))
    store = WeightStore.open(checkpoint, config, SILENT)
    (node,) = program.calls(h1.ssm_scan.default)
    (tensor,) = [tensor for tensor in program.states.tensors if tensor.kind is StateKind.RECURRENT]
    mb = sdk.builder()
    mil = sdk.mil()
    mil_program = sdk.mil().Program()
    (folder / layout.WEIGHTS).parent.mkdir(parents=True)
    with BlobStorage(Stage(folder), layout.WEIGHTS) as blobs:
        integers = Rounded(store, QuantScheme().precisions(config), quantize_rows)
        weights = Weights(store, integers, config, blobs=blobs, compute=np.float16)
        states = HeldStates([tensor], 64, np.float16)
        shapes = Context(program, weights, states, call=call, max_context=64, position=None, n_valid=None)
        ports = {
            name: mb.placeholder(shape=shapes.shape(node.args[i]), dtype=mil.types.fp16) for name, i in INPUTS.items()
        }  # type: ignore[arg-type]
        with mil.Function({**ports, **states.placeholders()}, opset_version=sdk.coremltools().target.iOS18) as function:
            states.inputs = {name: function.inputs[name] for name in states.placeholders()}
            context = Context(program, weights, states, call=call, max_context=64, position=None, n_valid=None)
            for name, index in INPUTS.items():
                context.set(node.args[index], function.inputs[name])  # type: ignore[arg-type]
            context.set(node.args[8], ALL_REAL)  # type: ignore[arg-type]
            TABLE[node.target](context, node)
            function.set_outputs([mb.identity(x=context.value(node)[0], name="y")])
        mil_program.add_function(call.name, function)
        mil_program.default_function_name = call.name
        mil_program.export_as_multifunction = True
        model = writer.protobuf(mil_program, weights, {})
        blobs.finish()
    writer.write(folder, model)
    return Evaluator(Package.open(folder / layout.PACKAGE), call.name)


def inputs(checkpoint: Path, count: int) -> Arrays:
    """Return fp16 inputs of ``count`` tokens; x and B have a nonzero mean, so that states grow."""
    s = FalconH1Config.load(checkpoint)
    random = np.random.default_rng(0)
    shapes = {"x": (s.mamba_n_heads, s.mamba_d_head), "dt": (s.mamba_n_heads,)} | dict.fromkeys(
        "BC", (s.mamba_n_groups, s.mamba_d_state)
    )
    values = {name: random.standard_normal((1, count, *shape)) for name, shape in shapes.items()}
    return {name: (0.1 * value if name == "dt" else value + 0.5).astype(np.float16) for name, value in values.items()}


def recurrence(checkpoint: Path, given: Arrays) -> np.ndarray[Any, Any]:
    """Return the state after all tokens, computed in float64."""
    config = FalconH1Config.load(checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    A = -np.exp(weights["model.layers.0.mamba.A_log"])
    bias = weights["model.layers.0.mamba.dt_bias"]
    x, dt, B = (given[name][0].astype(np.float64) for name in ("x", "dt", "B"))
    step = np.logaddexp(0, dt + bias.astype(np.float64))
    state = np.zeros((config.mamba_n_heads, config.mamba_d_head, config.mamba_d_state))
    repeated = B.repeat(config.mamba_n_heads // config.mamba_n_groups, axis=1)
    for t in range(len(x)):
        added = step[t, :, None, None] * x[t, :, :, None] * repeated[t, :, None, :]
        state = np.exp(step[t] * A)[:, None, None] * state + added
    return state


def run(evaluator: Evaluator, given: Arrays, call: Call, *, keep_low: bool = True) -> np.ndarray[Any, Any]:
    states = evaluator.initial_states()
    (name,) = [name for name in states if not name.endswith(LOW)]
    for start in range(0, given["x"].shape[1], call.tokens):
        evaluator.run({key: array[:, start : start + call.tokens] for key, array in given.items()}, states)
        if not keep_low:
            states[name + LOW] = np.zeros_like(states[name + LOW])
    return (states[name].astype(np.float64) + states[name + LOW].astype(np.float64) / LOW_SCALE)[0]


def per_head(found: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> float:
    """Return the worst head's largest error, divided by that head's largest value."""
    return float((np.abs(found - truth).max(axis=(1, 2)) / np.abs(truth).max(axis=(1, 2))).max())


def test_slow_heads_keep_their_state_over_decode_steps(slow: Path, tmp_path: Path) -> None:
    evaluator = scan_package(slow, tmp_path, DECODE)
    given = inputs(slow, STEPS)
    truth = recurrence(slow, given)
    assert per_head(run(evaluator, given, DECODE), truth) <= 1e-3
    assert per_head(run(evaluator, given, DECODE, keep_low=False), truth) > 1e-2  # what a single fp16 state would do


def test_slow_heads_keep_their_state_over_chunks(slow: Path, tmp_path: Path) -> None:
    given = inputs(slow, 32 * PREFILL.tokens)
    assert per_head(run(scan_package(slow, tmp_path, PREFILL), given, PREFILL), recurrence(slow, given)) <= 1e-3
