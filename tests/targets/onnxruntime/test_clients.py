"""Other people's software on our folder, and the door to onnxruntime itself."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest

from h1export import pipeline
from h1export.core.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.generation import Sampling, generate
from h1export.targets.onnxruntime import sdk
from h1export.text import load_tokenizer

Build = Callable[..., Artifact]
PROMPT = "def main(argv):\n    parser ="


def genai_tokens(folder: Path, count: int, split: int | None = None) -> list[int]:
    """Greedy tokens by onnxruntime-genai from text, by its own tokenizer."""
    model = og.Model(str(folder))
    ids = og.Tokenizer(model).encode(PROMPT)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(ids) + count, batch_size=1)
    generator = og.Generator(model, parameters)
    for part in (ids,) if split is None else (ids[:split], ids[split:]):
        generator.append_tokens(part)
    tokens: list[int] = []
    while not generator.is_done() and len(tokens) < count:
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


@pytest.mark.parametrize("split", [None, 3])
def test_genai_generates_what_we_generate(split: int | None, tiny: Path, build: Build) -> None:
    artifact = build(tiny)
    prompt = np.array(load_tokenizer(artifact.folder).encode(PROMPT, add_special_tokens=False).ids, np.int64)
    ours = list(generate(pipeline.load(artifact), prompt, 64, Sampling(), frozenset()))
    theirs = genai_tokens(artifact.folder, 64, split)
    assert theirs == ours[: len(theirs)]
    assert len(theirs) == 64 or theirs[-1] in artifact.spec.eos_token_ids


def test_genai_tokenizes_as_tokenizers_does(tiny: Path, build: Build) -> None:
    artifact = build(tiny)
    text = (tiny / "heldout.txt").read_text(encoding="utf-8")
    theirs = og.Tokenizer(og.Model(str(artifact.folder))).encode(text)
    assert list(map(int, theirs)) == load_tokenizer(artifact.folder).encode(text, add_special_tokens=False).ids


def fake_versions(installed: dict[str, str]) -> Callable[[str], str]:
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    return version


@pytest.mark.parametrize(
    ("installed", "says"),
    [({}, r"pip install 'h1export\[ort\]'"), ({"onnxruntime": "1.31", "onnxruntime-gpu": "1.31"}, "overwrite each other")],
)
def test_the_door_says_what_to_install(installed: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", fake_versions(installed))
    with pytest.raises(H1ExportError, match=says):
        sdk.onnxruntime()


def test_one_package_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", fake_versions({"onnxruntime-gpu": "1.31"}))
    module: Any = sdk.onnxruntime()
    assert module.__name__ == "onnxruntime"
