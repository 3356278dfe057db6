"""Engines, the plugin and torch-tensorrt on an NVIDIA GPU (`nox -s gpu`).

Without a GPU these tests are skipped. They have not been run yet.
"""

from __future__ import annotations

import importlib
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from h1export import cli
from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.plugins.gpu.cubin import ARCHITECTURES
from h1export.targets.tensorrt import sdk
from h1export.targets.tensorrt.engine.requirements import gpu_architecture
from h1export.targets.tensorrt.gpu.device import Gpu
from h1export.targets.tensorrt.target import OF_RTX
from h1export.validate.accuracy.logits import relative_error

pytestmark = pytest.mark.gpu

# Relative to the range of the logits, as on the CPU.
HALF = 5e-3
BRAIN = 4e-2
# Compared with transformers on the CPU, a tiny model may be slow on a GPU.
FAST = ("--tolerance", "latency.prefill=1e3", "--tolerance", "latency.decode=1e3")


@pytest.fixture(scope="module", autouse=True)
def architecture() -> int:
    """The compute capability of the GPU."""
    if not torch.cuda.is_available():
        pytest.fail("torch cannot use the GPU here: install PyTorch's build for CUDA")
    if os.environ["TRITON_INTERPRET"] != "0":
        pytest.fail("Triton's interpreter is on: set TRITON_INTERPRET=0, as nox -s gpu does")
    if (found := gpu_architecture()) not in ARCHITECTURES:
        pytest.skip(f"the kernels are not for sm_{found}")
    return found


@pytest.fixture(scope="module", params=["rtx", "tensorrt"])
def engine(
    request: pytest.FixtureRequest, architecture: int, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The embedded model's artifact with an engine for this GPU."""
    runtime: Any = request.param
    if not sdk.has(runtime):
        pytest.skip(f"{sdk.NAMES[runtime]} is not installed")
    if runtime == "rtx" and architecture not in OF_RTX:
        pytest.skip(f"TensorRT-RTX builds nothing for sm_{architecture}")
    out = tmp_path_factory.mktemp(runtime) / "out"
    command = [
        "build",
        "--target",
        "trt",
        "--quant",
        "int4",
        "--method",
        "rtn",
        "--max-context",
        "704",
        "--max-batch",
        "3",
        "--quiet",
    ]
    assert cli.run([*command, "--runtime", runtime, "--sm", str(architecture), "--out", str(out)]) == 0
    assert cli.run(["trt", "build-engine", str(out), "--quiet"]) == 0
    return out


def test_validate_passes_on_the_engine(engine: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["validate", str(engine), "--kernels", "native", "--json", *FAST]) == 0
    report = json.loads(capfd.readouterr().out)
    assert "on sm_" in report["subject"]["kernels"]


def test_decoding_by_a_graph_is_decoding_by_calls(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls with other sequences in between do not change the result."""
    recorded = []
    record = Gpu.record
    monkeypatch.setattr(Gpu, "record", lambda self, launch: recorded.append(record(self, launch)) or recorded[-1])
    runner = load_runner(Artifact.open(engine), kernels="native")
    ids = np.random.default_rng(0).integers(0, runner.config.vocab_size, (1, 40), dtype=np.int64)
    session = runner.start(1, 40)
    beside = runner.start(2, 40)
    states = runner.initial(1)
    for column in range(40):
        token = ids[:, column : column + 1]
        replayed = session.append(token)
        beside.append(np.repeat(token, 2, axis=0))
        called, states = runner.step(token, np.ones((1, column + 1), np.int64), states)
        assert relative_error(replayed[0], called[0]) <= HALF
    assert len(recorded) == 2


def test_torch_tensorrt_compiles_the_model(architecture: int, tiny: Path) -> None:
    """The logits of a prompt of 64 tokens in bf16 are compared with torch on the same GPU."""
    if find_spec("torch_tensorrt") is None:
        pytest.skip("torch-tensorrt is not installed")
    torch_tensorrt: Any = importlib.import_module("torch_tensorrt")
    integration: Any = importlib.import_module("h1export.integrations.torch_tensorrt")
    integration.register(tiny)
    model = integration.load(tiny).cuda()
    ids = torch.arange(64).cuda()[None]
    mask = torch.ones(1, 64, dtype=torch.int64).cuda()
    padded = torch.cat([torch.zeros_like(mask[:, :8]), mask], dim=1)
    arguments = (ids, padded, integration.zero_states(model, past=8))
    with torch.no_grad():
        expected = model(*arguments)[0]
        exported = torch.export.export(model, arguments, strict=False).run_decompositions(
            dict(integration.DECOMPOSITIONS)
        )
        compiled = torch_tensorrt.dynamo.compile(exported, arg_inputs=arguments, min_block_size=1)
        found = compiled(*arguments)[0]
    assert relative_error(found[0].float().cpu().numpy(), expected[0].float().cpu().numpy()) <= BRAIN
