"""Checkpoints for every test: the embedded model, and random Falcon-H1 models that together use every config switch."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from gptq_files import Gptq, Written, write
from released_config import RELEASED
from tokenizers import Tokenizer, models, pre_tokenizers

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.resolve import embedded_model
from h1export.commands.build import build_artifact
from h1export.graphs.program import Program
from h1export.graphs.trace import trace
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.quantize.calibration import Calibration
from h1export.quantize.scheme import QuantScheme
from h1export.targets import options_class, target_infos

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it at its import, and other packages import Triton
SHORT = Calibration(samples=4, length=256)  # of the tests' models, whose widths it exceeds: the moments have full rank

BASE: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_d_ssm": 192,
    "mamba_n_heads": 6,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "mamba_norm_before_gate": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e11},
    "embedding_multiplier": 5.65,
    "lm_head_multiplier": 0.39,
    "key_multiplier": 0.39,
    "attention_in_multiplier": 1.1,
    "attention_out_multiplier": 0.9375,
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.47,
    "ssm_multipliers": [0.3535, 0.25, 0.35, 0.5, 0.72],
    "mlp_multipliers": [0.88, 0.59],
    "tie_word_embeddings": False,
    "initializer_range": 0.08,
    "pad_token_id": 0,
    "head_dim": 32,
}

# Together, they have every switch of the config on and off, and every optional key absent; neighbouring sizes differ.
SWITCHES: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "norm_after_gate_two_groups": {"mamba_rms_norm": True, "mamba_n_groups": 2},
    "norm_before_gate_three_groups": {"mamba_rms_norm": True, "mamba_norm_before_gate": True, "mamba_n_groups": 3},
    "all_biases": {"attention_bias": True, "mlp_bias": True, "projectors_bias": True, "mamba_proj_bias": True},
    "tied": {"tie_word_embeddings": True, "mamba_conv_bias": False},
    "dt_limits": {"time_step_limit": (0.02, 0.3)},
    "dt_lower_limit": {"time_step_limit": (0.05, float("inf")), "num_key_value_heads": 4},
    "odd_sizes": {
        "mamba_d_conv": 3,
        "mamba_chunk_size": 7,
        "head_dim": 16,
        "num_key_value_heads": 1,
        "mamba_d_state": 24,
        "num_hidden_layers": 1,
    },
    "expand": {
        "mamba_d_ssm": None,
        "mamba_expand": 2,
        "mamba_n_heads": 4,
        "mamba_d_head": "auto",
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
    },
    "no_mup": {
        "embedding_multiplier": 1.0,
        "lm_head_multiplier": 1.0,
        "key_multiplier": 1.0,
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": 1.0,
        "ssm_in_multiplier": 1.0,
        "ssm_out_multiplier": 1.0,
        "ssm_multipliers": None,
        "mlp_multipliers": None,
        "mamba_d_conv": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "everything": {
        "attention_bias": True,
        "mlp_bias": True,
        "projectors_bias": True,
        "mamba_proj_bias": True,
        "mamba_rms_norm": True,
        "mamba_n_groups": 2,
        "tie_word_embeddings": True,
        "time_step_limit": (0.01, 0.5),
    },
}


def pytest_configure(config: pytest.Config) -> None:
    """Declare a marker for each target: its tests need the target's runtime."""
    for info in target_infos().values():
        config.addinivalue_line("markers", info.marker_line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of a folder whose tests all need a runtime."""
    root = Path(__file__).parents[1]
    for info in target_infos().values():
        for folder in info.test_folders:
            for item in items:
                if item.path.is_relative_to(root / folder):
                    item.add_marker(info.name)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that needs a GPU skips where there is none; what else is missing there is a failure."""
    if item.get_closest_marker("gpu") and shutil.which("nvidia-smi") is None:
        pytest.skip("no NVIDIA GPU here (nvidia-smi is missing)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``switches`` runs once for every entry of SWITCHES."""
    if "switches" in metafunc.fixturenames:
        metafunc.parametrize("switches", list(SWITCHES), scope="session")


@pytest.fixture(scope="session", autouse=True)
def each_trace_once() -> Iterator[None]:
    """Builds of one architecture share its trace, which takes two seconds; each gets a copy, whose graph it changes."""
    traces: dict[tuple[str, bool], Program] = {}

    def copied(config: FalconH1Config, last_only: bool = False) -> Program:
        key = (repr(config), last_only)
        if key not in traces:
            traces[key] = trace(config, last_only)
        return copy.deepcopy(traces[key])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("h1export.commands.build.trace", copied)
        yield


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The embedded trained model."""
    return embedded_model()


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The GPU, for tests that are marked gpu; Triton chooses interpreter or compiler once per process."""
    if not torch.cuda.is_available():
        pytest.fail("torch cannot use the GPU here: install PyTorch's build for CUDA")
    if os.environ["TRITON_INTERPRET"] != "0":
        pytest.fail("Triton's interpreter is on: set TRITON_INTERPRET=0, as nox -s gpu does")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def released() -> dict[str, Any]:
    """The released 0.5B config, to be changed at will."""
    return copy.deepcopy(dict(RELEASED))


@pytest.fixture(scope="session")
def config_of() -> Callable[..., FalconH1Config]:
    """config_of(key=value, ...) -> the released 0.5B architecture with these keys changed."""
    return lambda **changes: FalconH1Config.from_config({**copy.deepcopy(dict(RELEASED)), **changes})


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_checkpoint("tied", **config) -> folder of a random bf16 model, made once; treat it as read-only.

    ``seed`` is that of the weights.
    """
    made: dict[str, Path] = {}

    def make(name: str = "plain", seed: int = 0, **config: Any) -> Path:
        key = f"{name} {seed} {sorted(config.items(), key=str)}"
        if key not in made:
            made[key] = _save(tmp_path_factory.mktemp(name), BASE | SWITCHES[name] | config, seed)
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_spoken(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_spoken(**config) -> the plain random model with a tokenizer of a token a byte, made once; read-only."""
    made: dict[str, Path] = {}

    def make(**config: Any) -> Path:
        key = str(sorted(config.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("spoken") / "checkpoint"
            made[key] = Path(shutil.copytree(make_checkpoint(**config), folder))
            letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
            tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.save(str(folder / "tokenizer.json"))
        return made[key]

    return make


@pytest.fixture(scope="session")
def spoken_checkpoint(make_spoken: Callable[..., Path]) -> Path:
    """The plain random model with a tokenizer of a token a byte, for calibration; treat it as read-only."""
    return make_spoken()


PACKABLE = {
    "vocab_size": 264,
    "num_hidden_layers": 1,
    "mamba_d_ssm": 256,
    "mamba_n_heads": 8,
}  # rows that fill words of codes


@pytest.fixture(scope="session")
def make_gptq(make_checkpoint: Callable[..., Path]) -> Callable[..., Written]:
    """make_gptq(folder, bits=8, ...) -> a prequantized checkpoint of a random one-layer model, by gptq_files.Gptq."""

    def make(folder: Path, name: str = "plain", **how: Any) -> Written:
        return write(make_checkpoint(name, **PACKABLE), folder, Gptq(**how))

    return make


@pytest.fixture(scope="session")
def gptq_logits(make_checkpoint: Callable[..., Path]) -> Callable[..., Any]:
    """gptq_logits(written, ids [n]) -> transformers' logits [n, vocab] on weights that the writer dequantised."""
    from transformers import FalconH1ForCausalLM

    def logits(written: Written, ids: Any, name: str = "plain") -> Any:
        model: Any = FalconH1ForCausalLM.from_pretrained(make_checkpoint(name, **PACKABLE), dtype=torch.float32).eval()
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for tensor in written.codes:
                parameters[tensor].copy_(torch.from_numpy(written.weight(tensor)))
            return model(torch.from_numpy(ids)[None]).logits[0].numpy()

    return logits


@pytest.fixture
def copy_checkpoint(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Like make_checkpoint, but a copy that the test may damage."""
    return lambda name="plain", **config: Path(
        shutil.copytree(make_checkpoint(name, **config), tmp_path / "checkpoint")
    )


@pytest.fixture(scope="session")
def checkpoint(switches: str, make_checkpoint: Callable[..., Path]) -> Path:
    """One random model per entry of SWITCHES."""
    return make_checkpoint(switches)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Artifact]:
    """build(checkpoint, "int4", graph="cuda") -> an artifact, made once; treat it as read-only.

    The keywords are fields of the target's options; products, keys and values are float32 unless they say otherwise.
    Integers are rounded unless ``method`` says otherwise; the calibration text is short.
    """
    made: dict[tuple[Any, ...], Artifact] = {}

    def make(
        checkpoint: Path,
        quant: str = "none",
        group_size: int = 32,
        target: str = "ort",
        method: str = "rtn",
        **chosen: Any,
    ) -> Artifact:
        own = options_class(target)
        names = {field.name for field in fields(own)} - ({"kv"} if chosen.get("graph") == "cuda" else set())
        exact = {name: value for name, value in {"accuracy_level": 0, "kv": "fp32"}.items() if name in names}
        options = own(**exact | chosen)
        key = (checkpoint, quant, group_size, target, method, options)
        if key not in made:
            scheme = QuantScheme(quant, group_size, method)  # type: ignore[arg-type]
            out = tmp_path_factory.mktemp("built") / "out"
            made[key] = build_artifact(checkpoint, target, out, scheme=scheme, options=options, calibration=SHORT)
        return made[key]

    return make


@pytest.fixture
def earlier_build(build: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Artifact]:
    """Builds with the logits of the last position for ONNX Runtime, as before calls said how many they want."""

    def make(checkpoint: Path, *arguments: Any, **chosen: Any) -> Artifact:
        with monkeypatch.context() as patched:
            patched.setattr("h1export.targets.onnxruntime.options.OrtOptions.asks_for_logits", False)
            return build(checkpoint, *arguments, **chosen, logits="last")

    return make


@pytest.fixture
def without_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let builds for TensorRT write an empty plugin: no compiler runs, and sizes that no kernel has are allowed."""

    def write(folder: Path, *_: Any) -> dict[str, dict[str, int]]:
        folder.mkdir()
        (folder / "libh1export_plugin.so").touch()
        return {"decode sm_89": {"registers": 40, "spilled": 0, "shared": 1024}}

    monkeypatch.setattr("h1export.targets.tensorrt.plugin.kernels", lambda *_, **__: ())
    monkeypatch.setattr("h1export.targets.tensorrt.plugin.write", write)


def _save(folder: Path, config: dict[str, Any], seed: int) -> Path:
    from transformers import FalconH1Config as TransformersConfig
    from transformers import FalconH1ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would stand in what tests of the command line capture
    torch.manual_seed(seed)
    model = FalconH1ForCausalLM(TransformersConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _make_nontrivial(name, parameter)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _make_nontrivial(name: str, parameter: torch.Tensor) -> None:
    """Initial values that no exporter could drop without being seen: no zeros, no ones."""
    if name.endswith("dt_bias"):
        parameter.copy_(torch.randn_like(parameter) * 1.5 - 2)
    elif name.endswith("A_log"):
        parameter.copy_(torch.log(1 + 15 * torch.rand_like(parameter)))
    elif name.endswith(".D"):
        parameter.copy_(torch.randn_like(parameter))
    elif "norm" in name:
        parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    elif "conv1d" in name:
        parameter.copy_(torch.randn_like(parameter) * 0.4)
    elif parameter.ndim == 1:
        parameter.copy_(0.1 * torch.randn_like(parameter))
