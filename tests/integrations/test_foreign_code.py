"""No file of a checkpoint or an artifact runs code: it is planted wherever one can name some, and leaves no trace."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from h1export import hf
from h1export.cli import run

AUTO = ("Config", "Model", "ModelForCausalLM", "Tokenizer", "Processor", "GenerationConfig", "ImageProcessor")
MODULES = ("configuration_planted", "modeling_planted", "tokenization_planted", "tokenizer", "generation_planted")
CLASSES = ("Planted", "PlantedFast", "PlantedConfig", "PlantedForCausalLM", "Tokenizer", "generate")
QUICK = ("--latency-pairs", "0", "--text-bytes", "500", "--prompts", "0")
ESCAPES = (
    "{{ cycler.__init__.__globals__.os.system('MARK') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% import 'planted.jinja' as planted %}",
    "{{ namespace.__init__.__globals__['__builtins__']['__import__']('os').system('MARK') }}",
)


class Silent(io.StringIO):
    """A standard input that answers yes to everything, and knows whether it was asked; `chat` reads its bytes."""

    buffer = io.BytesIO(b"hi\n")

    asked = False

    def readline(self, *args: Any) -> str:
        self.asked = True
        return "y\n"

    def read(self, size: int | None = -1, /) -> str:
        return self.readline() if size else ""


@pytest.fixture(scope="module")
def marker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("marker") / "ran"


def plant(folder: Path, marker: Path) -> None:
    """Add code to every place of ``folder`` that some library of the field reads code from."""
    code = f"open({str(marker)!r}, 'a').write(__name__ + '\\n')\n" + "".join(
        f"class {name}:\n    def __new__(*a, **k): open({str(marker)!r}, 'a').write('{name}')\n" for name in CLASSES
    )
    for module in (*MODULES, "__init__", "custom_generate/generate", "sitecustomize", "jinja2", "conftest"):
        path = folder / f"{module}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    for name in ("planted.jinja", "custom_generate/requirements.txt"):
        (folder / name).write_text("planted")
    names = {f"Auto{kind}": f"{module}.Planted" for kind, module in zip(AUTO, (*MODULES, *MODULES), strict=False)} | {
        "AutoTokenizer": ["tokenization_planted.Planted", "tokenization_planted.PlantedFast"]
    }
    keys = {
        "auto_map": names,
        "tokenizer_class": "PlantedTokenizer",
        "processor_class": "PlantedProcessor",
        "custom_code": True,
        "trust_remote_code": True,
        "custom_generate": str(folder),
        "attn_implementation": "planted/kernel",
        "experts_implementation": "planted/kernel",
    }
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
        path = folder / name
        found = json.loads(path.read_text()) if path.exists() else {}
        refused = ("auto_map",) if name == "config.json" else ()  # see test_code_in_config_json
        path.write_text(json.dumps({**found, **{key: keys[key] for key in keys if key not in refused}}))
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps(keys))


@pytest.fixture(scope="module")
def checkpoint(tiny: Path, tmp_path_factory: pytest.TempPathFactory, marker: Path) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "checkpoint"
    shutil.copytree(tiny, folder)
    plant(folder, marker)
    return folder


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, marker: Path) -> Path:
    """Built from the planted checkpoint, and planted again: its own files are a stranger's, too."""
    out = tmp_path_factory.mktemp("built") / "out"
    assert (
        run(
            [
                "build",
                str(checkpoint),
                "--target",
                "ort",
                "--quant",
                "int4",
                "--method",
                "rtn",
                "--out",
                str(out),
                "--quiet",
            ]
        )
        == 0
    )
    kept = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    plant(out, marker)
    for path, text in kept.items():  # of the sizes in the manifest
        path.write_bytes(text)
    assert b"custom_code" in (out / "config.json").read_bytes()
    assert b"auto_map" in (out / "tokenizer_config.json").read_bytes()
    return out


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "lines.jsonl").write_text(json.dumps({"line": "import os"}) + "\n")
    task = {
        "task": "planted_task",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "lines.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{line}}",
        "doc_to_target": "x",
        "generation_kwargs": {"max_gen_toks": 2, "until": ["\n"]},
        "metric_list": [{"metric": "exact_match"}],
    }
    (folder / "planted.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture
def stdin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, marker: Path) -> Iterator[None]:
    stream = Silent()
    if getattr(request, "param", "open") == "closed":
        stream.close()
    monkeypatch.setattr(sys, "stdin", stream)
    monkeypatch.syspath_prepend(str(marker.parent))
    yield
    assert not stream.asked
    assert not marker.exists(), marker.read_text()


COMMANDS: dict[str, Callable[[str, str, str], list[str]]] = {
    "plan": lambda model, out, tasks: ["plan", model, "--target", "ort"],
    "inspect": lambda model, out, tasks: ["inspect", out],
    "inspect_checkpoint": lambda model, out, tasks: ["trace", model],
    "validate": lambda model, out, tasks: ["validate", out, model, *QUICK],
    "generate": lambda model, out, tasks: ["generate", out, "import os", "--max-tokens", "2"],
    "generate_chat": lambda model, out, tasks: ["generate", out, "hi", "--chat", "--max-tokens", "2"],
    "generate_system": lambda model, out, tasks: ["generate", out, "hi", "--system", "Be.", "--max-tokens", "2"],
    "chat": lambda model, out, tasks: ["chat", out, "--max-tokens", "2"],
    "eval": lambda model, out, tasks: ["eval", out, "--tasks", "planted_task", "--include", tasks],
    "eval_chat": lambda model, out, tasks: ["eval", out, "--tasks", "planted_task", "--include", tasks, "--chat"],
    "doctor": lambda model, out, tasks: ["doctor", out],
}


@pytest.mark.parametrize(
    ("command", "stdin"),
    [*((command, "open") for command in COMMANDS), ("generate_chat", "closed"), ("eval_chat", "closed")],
    indirect=["stdin"],
)
def test_commands(
    command: str, checkpoint: Path, artifact: Path, tasks: Path, *, stdin: None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(COMMANDS[command](str(checkpoint), str(artifact), str(tasks))) == 0, capfd.readouterr().err
    assert "trust_remote_code" not in capfd.readouterr().err


@pytest.mark.parametrize("command", ["plan", "inspect", "validate", "generate_chat", "eval_chat", "doctor"])
def test_code_in_config_json(  # an `auto_map` there may mean another model
    command: str, checkpoint: Path, artifact: Path, tasks: Path, *, stdin: None, tmp_path: Path, capfd: Any
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    for source, folder in ((checkpoint, model), (artifact, out)):
        shutil.copytree(source, folder)
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "configuration_planted.Planted", "AutoModel": "modeling_planted.Planted"}
        (folder / "config.json").write_text(json.dumps(config))
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"]["config.json"][1] = (out / "config.json").stat().st_size
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert run(COMMANDS[command](str(model), str(out), str(tasks))) in (0, 1, 2)
    assert run(["generate", str(out), "hi", "--chat"]) == 2
    assert "key 'auto_map' is" in capfd.readouterr().err


def test_inside_transformers(artifact: Path, stdin: None) -> None:
    model: Any = hf.load(artifact)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2).shape[1] <= 5


@pytest.mark.parametrize("template", ESCAPES)
def test_templates(
    template: str, artifact: Path, marker: Path, stdin: None, tmp_path: Path, *, capfd: pytest.CaptureFixture[str]
) -> None:
    """A template that looks for a way out of its sandbox gets an error, and the user one line."""
    folder = tmp_path / "out"
    shutil.copytree(artifact, folder)
    (folder / "chat_template.jinja").write_text(template.replace("MARK", f"touch {marker}"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["chat_template.jinja"][1] = (folder / "chat_template.jinja").stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert run(["generate", str(folder), "hi", "--chat"]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "chat template: fails: " in err


def test_what_is_planted_would_run(checkpoint: Path, marker: Path) -> None:
    """The test of the tests: a library that trusts the folder leaves the mark."""
    from transformers import AutoTokenizer

    with pytest.raises(Exception, match="Planted"):
        AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    assert marker.read_text()
    marker.unlink()
