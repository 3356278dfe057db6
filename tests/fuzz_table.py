"""The files that h1export reads itself, how each is written, and what reads it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper
from released_config import RELEASED

from h1export.artifact.artifact import Artifact
from h1export.artifact.journal import JOURNAL, Extent, Journal
from h1export.artifact.manifest import MANIFEST
from h1export.artifact.signature import SIGNATURE, sign, verify
from h1export.checkpoint.chat_template import ChatTemplate
from h1export.checkpoint.lora_config import LoraConfig
from h1export.checkpoint.packed_formats import load_format
from h1export.checkpoint.safetensors_header import read_header
from h1export.checkpoint.shards import read_entries
from h1export.checkpoint.tokenizer import load_tokenizer
from h1export.commands.load import read_options
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.special_tokens import special_tokens
from h1export.model.falcon_h1.states import StateSpec
from h1export.quantize.calibration import Calibration
from h1export.quantize.precision_plan import read_plan
from h1export.report.checks import CheckKind, Comparison
from h1export.report.report import Report, Row
from h1export.runtime.continued import Continued
from h1export.runtime.saved_states import SavedStates
from h1export.runtime.state_file import StateFile
from h1export.targets.coreml.evaluator.package import model_file
from h1export.targets.onnx.graph_file import read_graph
from h1export.targets.tensorrt.engine.config import EngineConfig
from h1export.targets.tensorrt.engine.requirements import EngineRequirements
from h1export.targets.tensorrt.options import TensorRTOptions
from h1export.validate.speed.gate_file import Baseline, read_baselines, read_gates, write_baselines
from h1export.validate.speed.statistics import Estimate


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


def write_requirements(path: Path) -> None:
    data = json.loads(path.read_text())
    kernels = {"decode sm_80": {"registers": 40, "spills": 0}}
    plugin = 64 * "1"
    wanted = EngineRequirements("rtx", "1.7", (80, 86), plugin, engine="", kernels=kernels)
    path.write_text(json.dumps({**data, "requirements": wanted.to_json()}))


SMALL = FalconH1Config.from_config({**RELEASED, "num_hidden_layers": 1})


def write_chat(path: Path) -> None:
    arrays = {tensor.key: np.ones(tensor.sized(1, 2), np.float32) for tensor in StateSpec.of(SMALL).tensors}
    StateFile("a", [{"role": "user", "content": "b"}], Continued((1, 2), SavedStates(0, 2, arrays))).write(path)


def write_graph(path: Path) -> None:
    """Write a graph with weights outside it, in itself, in a node, and in a graph inside a node."""
    outside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "model.onnx.data"), ("offset", "0"), ("length", "16")):
        outside.external_data.add(key=key, value=value)
    inside = helper.make_tensor("v", TensorProto.FLOAT, [2], [1.0, 2.0])
    graph = helper.make_graph([helper.make_node("Constant", [], ["c"], value=inside)], "g", [], [], [outside, inside])
    node = helper.make_node("If", ["c"], ["d"], then_branch=graph, else_branch=graph)
    onnx.save(helper.make_model(helper.make_graph([node], "h", [], [], [outside])), path)


def write_package(path: Path) -> None:
    (path.parent / "Data").mkdir(exist_ok=True)
    (path.parent / "Data" / "m.mlmodel").write_bytes(b"")
    entries = {"a": {"path": "m.mlmodel", "author": "b"}}
    path.write_text(json.dumps({"rootModelIdentifier": "a", "itemInfoEntries": entries}))


KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def write_key(path: Path, form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8) -> None:
    path.write_bytes(KEY.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))


def write_public_key(path: Path) -> None:
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.write_bytes(KEY.public_key().public_bytes(*form))


def with_public_key(folder: Path) -> Artifact:
    """Verify what ``write_key``'s key has signed."""
    if not (folder / SIGNATURE).exists():
        write_signature(folder / SIGNATURE)
    return verify(folder, folder.parent / "key.pub")


def steps_of(folder: Path) -> None:
    """Load a tokenizer, and take it both ways: some files fail there alone."""
    tokenizer = load_tokenizer(folder)
    tokenizer.decode([0, *tokenizer.encode("a b\n\u00e9 12").ids])


def matches_of(folder: Path) -> None:
    """Read an adapter's config, and match a name."""
    LoraConfig.load(folder).scaling("base_model.model.model.layers.0.self_attn.q_proj")


def write_signature(path: Path) -> None:
    key = path.parent.parent / "key.pem"
    write_key(key)
    sign(path.parent, key)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
ADAPTER = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 4}, "target_modules": ["q_proj"]}
TEMPLATES = [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "x"}]
TOKENIZER_CONFIG = {"chat_template": TEMPLATES, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
GATES = '[[gate]]\ntarget = "ort"\nquant = "int4"\nmemory = 1.2\n[[gate.timing]]\ndecode = 8\n'
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "a"}]},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": " ?\\w+|\\s+"}, "behavior": "Isolated", "invert": False},
            BYTE_LEVEL,
        ],
    },
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"a": {"id": "a", "ids": [0], "tokens": ["a"]}},
    },
    "decoder": BYTE_LEVEL,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "\u0120": 3}, "merges": [["a", "b"]], "unk_token": "a"},
}
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
    "requirements": Reader(MANIFEST, write_requirements, lambda folder: EngineRequirements.of(Artifact.open(folder))),
    "saved chat": Reader(
        "chat.safetensors", write_chat, lambda folder: StateFile.read(folder / "chat.safetensors", "a", SMALL)
    ),
    "graph": Reader(
        "model.onnx", write_graph, lambda folder: read_graph(folder / "model.onnx", {"model.onnx.data": ("", 256)})
    ),
    "package": Reader("Manifest.json", write_package, model_file),
    "key": Reader("key.pem", write_key, lambda folder: sign(folder, folder / "key.pem")),
    "OpenSSH's key": Reader(
        "key.ssh",
        lambda path: write_key(path, serialization.PrivateFormat.OpenSSH),
        lambda folder: sign(folder, folder / "key.ssh"),
    ),
    "public key": Reader("../key.pub", write_public_key, with_public_key),
    "signature": Reader(SIGNATURE, write_signature, lambda folder: verify(folder, folder.parent / "key.pem")),
    "calibration": Reader(
        "text.jsonl",
        text('{"text": "a a a"}\n{"text": "a"}\n'),
        lambda folder: Calibration(folder / "text.jsonl", samples=1, length=1).ids(folder),
    ),
    "special tokens": Reader(
        "generation_config.json",
        text('{"eos_token_id": [11, 3], "bos_token_id": 1, "temperature": 0.5}'),
        lambda folder: special_tokens(folder, FalconH1Config.from_config(dict(RELEASED))),
    ),
    "chat template": Reader("tokenizer_config.json", text(json.dumps(TOKENIZER_CONFIG)), ChatTemplate.read),
    "tokenizer": Reader("tokenizer.json", text(json.dumps(TOKENIZER)), steps_of),
    "index": Reader(
        INDEX,
        text('{"metadata": {"total_size": 32}, "weight_map": {"lm_head.weight": "a.safetensors"}}'),
        lambda folder: read_entries(folder, frozenset({"lm_head.weight"})),
    ),
    "weights": Reader("model.safetensors", write_weights, lambda folder: read_header(folder / "model.safetensors")),
    "adapter": Reader("adapter_config.json", text(json.dumps(ADAPTER)), matches_of),
    "gates": Reader("gates.toml", text(GATES), lambda folder: read_gates(folder / "gates.toml")),
    "baseline": Reader("b.json", write_baseline, lambda folder: read_baselines(folder / "b.json")),
    "precisions": Reader(
        "plan.yaml",
        text("tensors:\n  lm_head.weight: int8\n  a: none\n"),
        lambda folder: read_plan(folder / "plan.yaml"),
    ),
}
