"""Every file that may come from a stranger, mutated: what reads it reads it, or says in one short line why not.

``MUTATIONS`` of the environment says how many variants of each file are tried; `nox -s fuzz` tries 20,000.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from artifact_files import build
from mutations import MARK, mutated
from released_config import RELEASED

from h1export.artifact.artifact import Artifact
from h1export.artifact.journal import JOURNAL, Extent, Journal
from h1export.checkpoint.chat_template import ChatTemplate
from h1export.checkpoint.lora_config import LoraConfig
from h1export.checkpoint.packed_formats import load_format
from h1export.checkpoint.safetensors_header import read_header
from h1export.checkpoint.shards import read_entries
from h1export.checkpoint.tokenizer import load_tokenizer
from h1export.commands.load import read_options
from h1export.errors import MOST_SHOWN, H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.special_tokens import special_tokens
from h1export.quantize.precision_plan import read_plan
from h1export.report.checks import CheckKind, Comparison
from h1export.report.report import Report, Row
from h1export.targets.tensorrt.engine.config import EngineConfig
from h1export.targets.tensorrt.options import TensorRTOptions
from h1export.validate.speed.gate_file import Baseline, read_baselines, read_gates, write_baselines
from h1export.validate.speed.statistics import Estimate

COUNT = int(os.environ.get("MUTATIONS", "150"))
SECONDS = 2.0  # of one reading


@dataclass(frozen=True)
class Reader:
    """A file, how it is written, and what reads it."""

    file: str
    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    refuses: bool = True  # what cannot be read of a journal is left out, and written again


def text(content: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(content)


def write_report(path: Path) -> None:
    row = Row(CheckKind.CASE, Comparison.SOURCE, case="a", length=3, figures={"kl": float("nan")}, tolerances={"kl": 1})
    path.write_text(Report({"target": "ort"}, {"packages": {"a": "1"}}, (row,)).to_json())


def write_recipe(path: Path) -> None:
    ports: Mapping[str, Any] = {"input_ids": ("int64", ("batch", "sequence"))}
    options = TensorRTOptions()
    path.write_text(EngineConfig.of("rtx", (80, 86), ports, options=options, hashes={"a": 64 * "0"}).to_json())


def write_journal(path: Path) -> None:
    journal = Journal(path.parent)
    for number in range(3):
        journal.add(Extent("model.onnx.data", f"t{number}", 8 * number, 8), 64 * "0")


def write_weights(path: Path) -> None:
    header = {"lm_head.weight": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]}, "__metadata__": {"a": "b"}}
    body = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(body)) + body + bytes(32))


def write_baseline(path: Path) -> None:
    Estimate(1.0, 0.9, 1.1)
    write_baselines(
        path, {"ort int4": Baseline("m", {"g": {"Add": 1}}, {"f": 10}, step_bytes={"d": 1}, spills={"k": 0})}
    )


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
ADAPTER = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 4}, "target_modules": ["q_proj"]}
TEMPLATES = [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "x"}]
TOKENIZER_CONFIG = {"chat_template": TEMPLATES, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
GATES = '[[gate]]\ntarget = "ort"\nquant = "int4"\nmemory = 1.2\n[[gate.timing]]\ndecode = 8\n'
TOKENIZER = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
INDEX = "model.safetensors.index.json"
CONFIG = json.dumps(dict(RELEASED))

READERS = {
    "manifest": Reader("manifest.json", lambda path: None, lambda folder: read_options(Artifact.open(folder))),
    "report": Reader("report.json", write_report, lambda folder: Report.read(folder / "report.json")),
    "recipe": Reader("recipe.json", write_recipe, EngineConfig.read),
    "journal": Reader(JOURNAL, write_journal, Journal, refuses=False),
    "config": Reader("config.json", text(CONFIG), FalconH1Config.load),
    "quantisation": Reader(
        "config.json", text(json.dumps({**RELEASED, "quantization_config": GPTQ})), lambda folder: load_format(folder)
    ),
    "special tokens": Reader(
        "generation_config.json",
        text('{"eos_token_id": [11, 3], "bos_token_id": 1, "temperature": 0.5}'),
        lambda folder: special_tokens(folder, FalconH1Config.from_config(dict(RELEASED))),
    ),
    "chat template": Reader("tokenizer_config.json", text(json.dumps(TOKENIZER_CONFIG)), ChatTemplate.read),
    "tokenizer": Reader("tokenizer.json", text(json.dumps(TOKENIZER)), load_tokenizer),
    "index": Reader(
        INDEX,
        text('{"metadata": {"total_size": 32}, "weight_map": {"lm_head.weight": "a.safetensors"}}'),
        lambda folder: read_entries(folder, frozenset({"lm_head.weight"})),
    ),
    "weights": Reader("model.safetensors", write_weights, lambda folder: read_header(folder / "model.safetensors")),
    "adapter": Reader("adapter_config.json", text(json.dumps(ADAPTER)), LoraConfig.load),
    "gates": Reader("gates.toml", text(GATES), lambda folder: read_gates(folder / "gates.toml")),
    "baseline": Reader("b.json", write_baseline, lambda folder: read_baselines(folder / "b.json")),
    "precisions": Reader(
        "plan.yaml",
        text("tensors:\n  lm_head.weight: int8\n  a: none\n"),
        lambda folder: read_plan(folder / "plan.yaml"),
    ),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder that a reader reads without an error."""

    def prepare(name: str) -> Path:
        folder = tmp_path_factory.mktemp("fuzz") / "out"
        build(folder, FalconH1Config.from_config(dict(RELEASED)))
        if name == "manifest":  # options that the target has
            data = json.loads((folder / "manifest.json").read_text())
            data["target"] = "ort"
            data["options"] = {"accuracy_level": 4, "graph": "cpu", "logits": "all", "activations": "fp16"}
            (folder / "manifest.json").write_text(json.dumps(data))
        if name == "index":
            write_weights(folder / "a.safetensors")
        READERS[name].write(folder / READERS[name].file)
        return folder

    return prepare


@pytest.mark.parametrize("name", sorted(READERS.keys() - {"precisions"}))  # plans may come through a pipe
def test_a_pipe_in_the_place_of_a_file_is_never_waited_for(name: str, prepared: Callable[[str], Path]) -> None:
    folder = prepared(name)
    file = folder / READERS[name].file
    file.unlink()
    os.mkfifo(file)

    def waited(*_: object) -> None:
        raise AssertionError("waits for a pipe")

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(20)
    try:
        with suppress(H1ExportError):  # what reads an optional file may do without it
            READERS[name].read(folder)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_is_read_or_refused_in_one_line(name: str, prepared: Callable[[str], Path]) -> None:
    folder = prepared(name)
    reader = READERS[name]
    file = folder / reader.file
    content = file.read_bytes()
    shutil.copy(file, folder.parent / "original")
    reader.read(folder)
    chance = random.Random(f"{name} 1")
    refused = 0
    for number in range(COUNT):
        variant = mutated(content, chance)
        file.write_bytes(variant)
        (folder.parent / "variant").write_bytes(variant)  # what failed, for whoever looks
        began = time.process_time()  # which other work on the machine does not lengthen
        try:
            reader.read(folder)
        except H1ExportError as error:
            refused += 1
            message = str(error)
        else:
            message = ""
        assert time.process_time() - began < SECONDS, f"variant {number}"
        assert "\n" not in message
        assert len(message) <= MOST_SHOWN + len(str(file)), f"variant {number}: {message}"
        assert MARK * 20 not in message, f"variant {number}: {message}"
    assert refused > COUNT // 10 or not reader.refuses
