"""What the tests of lm-eval share: requests, lm-eval's own model, and artifacts with other files of the tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from h1export.artifact.artifact import Artifact

ROOM = 192  # tokens of a sequence
ROUNDING = 2e-3  # nats of up to a hundred float32 log likelihoods
SYSTEM = "You complete Python programs."
TEMPLATE = """{% for message in messages %}<|turn|>{{ message['role'] }}
{{ message['content'] }}{% if not loop.last or add_generation_prompt %}<|end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|turn|>assistant
{% endif %}"""


def hf(network: Any, folder: Path, max_length: int = ROOM) -> HFLM:
    """lm-eval's model; its cache of logits mixes up continuations of several lengths after one text."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return HFLM(pretrained=network, tokenizer=tokenizer, batch_size=1, max_length=max_length, logits_cache=False)


def requests(*args: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=arg) for arg in args]


def likelihoods(model: Any, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    found: list[tuple[float, bool]] = model.loglikelihood(requests(*pairs), disable_tqdm=True)
    return found


def texts(model: Any, *asked: tuple[str, dict[str, Any]]) -> list[str]:
    found: list[str] = model.generate_until(requests(*asked), disable_tqdm=True)
    return found


def edited(artifact: Artifact, folder: Path, file: str = "tokenizer_config.json", **values: Any) -> Path:
    """A copy of the artifact with a JSON file that says something else; None removes a key."""
    copy = Path(shutil.copytree(artifact.folder, folder / "copy"))
    config = {**json.loads((copy / file).read_text()), **values}
    rewrite(copy, file, json.dumps({key: value for key, value in config.items() if value is not None}))
    return copy


def rewrite(artifact: Path, file: str, text: str) -> None:
    """Replace a file of an artifact, whose manifest has its size."""
    (artifact / file).write_text(text, encoding="utf-8")
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["files"][file][1] = (artifact / file).stat().st_size
    (artifact / "manifest.json").write_text(json.dumps(manifest))
