"""Other software on our folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.tokenizer import load_tokenizer
from h1export.commands.load import load_runner
from h1export.runtime.generation import Sampling, generate
from h1export.targets.onnxruntime.genai_config import CONFIG
from h1export.targets.onnxruntime.inference_session import SETTINGS
from h1export.targets.onnxruntime.layouts import MODEL
from h1export.validate.accuracy.logits import log_softmax
from h1export.validate.accuracy.reference import Reference

Build = Callable[..., Artifact]
PROMPT = "def main(argv):\n    parser ="
PROMPTS = [PROMPT, "import os\nimport sys\n\nclass Foo(object):\n    def __init__(self", "x = 1\n"]


def genai(model: og.Model, rows: Any, count: int, **options: Any) -> og.Generator:
    """A generator that has read ``rows`` [batch, tokens] and has room for ``count`` more."""
    parameters = og.GeneratorParams(model)
    rows = np.array(rows, np.int32)
    parameters.set_search_options(do_sample=False, max_length=rows.shape[1] + count, batch_size=len(rows), **options)
    generator = og.Generator(model, parameters)
    generator.append_tokens(rows)
    return generator


def continued(generator: og.Generator, count: int, batch: int = 1) -> list[list[int]]:
    """``count`` new tokens of each row, and fewer after an end of text."""
    lengths = [len(generator.get_sequence(row)) for row in range(batch)]
    while not generator.is_done() and len(generator.get_sequence(0)) < lengths[0] + count:
        generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(row)[length:]] for row, length in enumerate(lengths)]


@pytest.mark.parametrize(
    "how", [{}, {"kv": "fp16"}, {"kv": "int8"}, {"graph": "portable"}], ids=["cpu", "fp16", "int8", "portable"]
)
@pytest.mark.parametrize("cuts", [(), (3,), (1, 2, 7)])
def test_genai_generates_what_we_generate_however_the_prompt_is_cut(
    cuts: tuple[int, ...], how: dict[str, Any], tiny: Path, build: Build
) -> None:
    artifact = build(tiny, **how)
    model = og.Model(str(artifact.folder))
    ids = og.Tokenizer(model).encode(PROMPT)
    ours = list(generate(load_runner(artifact), np.array(ids, np.int64), 64, sampling=Sampling(), eos=frozenset()))
    first, *rest = np.split(np.array(ids, np.int32), cuts)
    generator = genai(model, [first], len(ids) + 64)
    for part in rest:
        generator.append_tokens(part[None])
    (theirs,) = continued(generator, 64)
    assert theirs == ours[: len(theirs)]
    assert len(theirs) == 64 or theirs[-1] in artifact.config.eos_token_ids


def test_genai_generates_what_transformers_generates(tiny: Path, build: Build) -> None:
    """Greedy in float32: after the prompt and each token, the published model's best guess is the next one."""
    model = og.Model(str(build(tiny).folder))
    ids = list(map(int, og.Tokenizer(model).encode(PROMPT)))
    (theirs,) = continued(genai(model, [ids], 64), 64)
    logits, _ = Reference(tiny).full(np.array(ids + theirs[:-1], np.int64))
    assert theirs == logits[len(ids) - 1 :].argmax(-1).tolist()
    assert len(theirs) == 64


def test_genai_config_has_the_settings_of_our_own_sessions(tiny: Path, build: Build) -> None:
    config = json.loads((build(tiny).folder / CONFIG).read_text(encoding="utf-8"))
    assert config["model"]["decoder"]["session_options"].items() >= SETTINGS[MODEL].items()


@pytest.mark.parametrize("graph", ["cpu", "portable"])
def test_a_batch_of_one_length_is_its_rows_alone(graph: str, tiny: Path, build: Build) -> None:
    model = og.Model(str(build(tiny, graph=graph).folder))
    rows = [list(map(int, ids[:6])) for ids in map(og.Tokenizer(model).encode, PROMPTS)]
    together = continued(genai(model, rows, 24), 24, len(rows))
    assert together == [continued(genai(model, [row], 24), 24)[0] for row in rows]


# what the artifact's README.md says does not work; a test that fails here is good news for it


def test_rewinding_works_to_the_start_only(tiny: Path, build: Build) -> None:
    model = og.Model(str(build(tiny).folder))
    ids = og.Tokenizer(model).encode(PROMPT)
    generator = genai(model, [ids], 12)
    first = continued(generator, 6)
    with pytest.raises(RuntimeError, match="rewound"):
        generator.rewind_to(3)
    generator.rewind_to(0)
    generator.append_tokens(np.array([ids], np.int32))
    assert continued(generator, 6) == first


def test_rows_of_different_lengths_come_out_wrong(tiny: Path, build: Build) -> None:
    model = og.Model(str(build(tiny).folder))
    tokenizer = og.Tokenizer(model)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=64, batch_size=len(PROMPTS))
    generator = og.Generator(model, parameters)
    generator.append_tokens(tokenizer.encode_batch(PROMPTS))
    together = continued(generator, 12, len(PROMPTS))
    alone = [continued(genai(model, [tokenizer.encode(prompt)], 12), 12)[0] for prompt in PROMPTS]
    assert together != alone


def best_of_beams(runner: Any, prompt: list[int], count: int, beams: int) -> list[int]:
    """Beam search by whole forwards."""
    found: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(count):
        longer = []
        for score, tokens in found:
            row = np.array([prompt + tokens], np.int64)
            shares = log_softmax(runner.step(row, np.ones_like(row), runner.initial(1))[0][0, -1:])[0]
            longer += [(score + float(shares[token]), [*tokens, int(token)]) for token in np.argsort(shares)[-beams:]]
        found = sorted(longer, reverse=True)[:beams]
    return found[0][1]


def test_beam_search_comes_out_wrong(tiny: Path, build: Build) -> None:
    artifact = build(tiny)
    model = og.Model(str(artifact.folder))
    runner = load_runner(artifact)
    prompts = [list(map(int, ids)) for ids in map(og.Tokenizer(model).encode, PROMPTS)]
    theirs = [continued(genai(model, [prompt], 6, num_beams=3), 6)[0] for prompt in prompts]
    assert theirs != [best_of_beams(runner, prompt, 6, 3) for prompt in prompts]


def test_the_readme_is_made_for_the_graph(tiny: Path, build: Build) -> None:
    made = {"CPUs": {}, "CUDA": {"graph": "cuda"}, "any ONNX runtime": {"graph": "portable"}}
    for title, options in made.items():
        text = (build(tiny, **options).folder / "README.md").read_text(encoding="utf-8")
        assert title in text.splitlines()[0]
        assert all(words in text for words in ("Beam search", "rewind_to", "different lengths"))


def test_genai_tokenizes_as_tokenizers_does(tiny: Path, build: Build) -> None:
    artifact = build(tiny)
    text = (tiny / "heldout.txt").read_text(encoding="utf-8")
    theirs = og.Tokenizer(og.Model(str(artifact.folder))).encode(text)
    assert list(map(int, theirs)) == load_tokenizer(artifact.folder).encode(text, add_special_tokens=False).ids
