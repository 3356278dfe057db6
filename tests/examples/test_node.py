"""transformers.js in Node on folders of --layout transformers.js: the text and the logits are those of our Runner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.chat_template import ChatTemplate
from h1export.commands.generate import generate_text
from h1export.commands.load import load_runner
from h1export.runtime.generation import Sampling
from h1export.targets.onnxruntime.options import LayoutName

pytestmark = [pytest.mark.ort, pytest.mark.node]

Build = Callable[..., Artifact]
LAYOUT: LayoutName = "transformers.js"
EXACT = 1e-5  # of the range, in float32
PROMPTS = ["def main():", "import os\nimport sys\n\nclass Foo(object):", "x"]
TOKENS = 48
CALLS = [[72, 105, 33, 50, 60, 7], [11], [200, 3, 90], [5], [17]]  # of random models, whose vocabulary has 259


def ours(artifact: Artifact, prompt: str) -> str:
    """Return the prompt and what `h1export generate` continues it by."""
    return prompt + "".join(generate_text(artifact.folder, prompt, TOKENS, sampling=Sampling()))


@pytest.mark.parametrize("graph", ["cpu", "portable"])
def test_the_example_prints_the_text_of_generate(
    graph: str, tiny: Path, build: Build, node: Callable[..., str]
) -> None:
    artifact = build(tiny, "int4", graph=graph, layout=LAYOUT, accuracy_level=4)
    for prompt in PROMPTS[:2]:
        text = node("node/generate.mjs", artifact.folder, prompt, TOKENS)
        assert text == ours(artifact, prompt) + "\n"


def test_a_padded_batch_has_the_texts_of_its_rows(tiny: Path, build: Build, asked: Callable[..., Any]) -> None:
    artifact = build(tiny, "int4", layout=LAYOUT)
    job = {"task": "batch", "folder": str(artifact.folder), "prompts": PROMPTS, "tokens": TOKENS}
    assert asked([job])[0] == [ours(artifact, prompt) for prompt in PROMPTS]


def test_a_conversation_is_framed_as_here(tiny: Path, build: Build, asked: Callable[..., Any]) -> None:
    folder = build(tiny, "int4", layout=LAYOUT).folder
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    found = asked([{"task": "chat", "folder": str(folder), "messages": messages}])[0]
    assert found == ChatTemplate.read(tiny).render(messages)


def test_every_precision_and_switch_step_by_step(
    make_checkpoint: Callable[..., Path], build: Build, asked: Callable[..., Any]
) -> None:
    """Each precision has a file name of its own, and "dt_lower_limit" an Infinity in its config.json."""
    artifacts = [
        build(make_checkpoint(name), quant, layout=LAYOUT)
        for name, quant in [("plain", "none"), ("tied", "int8"), ("everything", "int4"), ("dt_lower_limit", "int4")]
    ]
    jobs = [{"task": "steps", "folder": str(artifact.folder), "calls": CALLS} for artifact in artifacts]
    for artifact, found in zip(artifacts, asked(jobs), strict=True):
        runner = load_runner(artifact)
        states, total = runner.initial(1), 0
        for call, theirs in zip(CALLS, found, strict=True):
            total += len(call)
            mask = np.ones((1, total), np.int64)
            logits, states = runner.step(np.array([call], np.int64), mask, states)
            assert np.abs(logits[0] - theirs).max() <= EXACT * np.ptp(logits), artifact.folder
