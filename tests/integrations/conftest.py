"""Fixtures of the tests of lm-eval: a small artifact, and lm-eval's own `hf` on the weights that it stores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval_requests import ROOM, TEMPLATE, hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from h1export.artifact.artifact import Artifact
from h1export.integrations.lm_eval import ArtifactLM
from h1export.validate.accuracy.reference import Reference

Build = Callable[..., Artifact]
VOCAB = 320


@pytest.fixture(scope="session")
def small_artifact(
    make_checkpoint: Callable[..., Path], tiny: Path, build: Build, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """A random model of one layer with a tokenizer whose tokens are of one or several bytes."""
    folder = tmp_path_factory.mktemp("small") / "checkpoint"
    special = {"pad_token": "<|pad|>", "bos_token": "<|start|>", "eos_token": "<|end|>"}
    shutil.copytree(make_checkpoint(vocab_size=VOCAB, num_hidden_layers=1), folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[*special.values(), "<|turn|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([(tiny / "heldout.txt").read_text(encoding="utf-8")], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return build(folder, "int4")


@pytest.fixture(scope="session")
def ours(small_artifact: Artifact) -> ArtifactLM:
    return ArtifactLM(small_artifact.folder, max_length=ROOM)


@pytest.fixture(scope="session")
def network(small_artifact: Artifact, ours: ArtifactLM, make_checkpoint: Callable[..., Path]) -> Any:
    """transformers' model with the artifact's integers, dequantised."""
    reference = Reference(make_checkpoint(vocab_size=VOCAB, num_hidden_layers=1))
    reference.hold(ours.runner.stored_weights())  # type: ignore[attr-defined]
    return reference._model


@pytest.fixture(scope="session")
def theirs(network: Any, small_artifact: Artifact) -> HFLM:
    return hf(network, small_artifact.folder)
