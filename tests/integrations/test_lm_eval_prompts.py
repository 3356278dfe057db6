"""The prompts and prefix tokens of lm-eval's tasks are those of its own `hf`, whatever the tokenizer's files say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval_requests import ROUNDING, SYSTEM, TEMPLATE, edited, hf, likelihoods, rewrite, texts

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.integrations.lm_eval import ArtifactLM

REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"


@pytest.mark.parametrize(
    ("tokenizer", "prefix"),
    [
        ({}, "<|start|>"),
        ({"bos_token": "<|turn|>"}, "<|turn|>"),
        ({"bos_token": {"__type": "AddedToken", "content": "<|turn|>"}}, "<|turn|>"),
        ({"bos_token": None}, "<|end|>"),  # as published, where bos 1 of config.json is no begin token
        ({"bos_token": None, "eos_token": "<|turn|>"}, "<|turn|>"),
        ({"add_bos_token": True}, "<|start|>"),
    ],
    ids=["same", "turn", "added", "none", "end", "add"],
)
def test_the_prefix_token_is_the_tokenizers(
    tokenizer: dict[str, Any], prefix: str, small_artifact: Artifact, network: Any, tmp_path: Path
) -> None:
    folder = edited(small_artifact, tmp_path, **tokenizer)
    mine = ArtifactLM(folder, max_length=64)
    other = hf(network, folder, max_length=64)
    assert (mine.prefix_token_id, mine.eot_token_id) == (other.prefix_token_id, other.eot_token_id)
    assert mine.prefix_token_id == mine._tokenizer.library.token_to_id(prefix)
    pairs = [("", "import sys"), ("import", " sys"), ("<|turn|>import", " sys"), ("", "<|turn|>user")]
    for answer, expected in zip(likelihoods(mine, *pairs), likelihoods(other, *pairs), strict=True):
        assert answer == (pytest.approx(expected[0], abs=ROUNDING), expected[1])
    asked = ("import", {"max_gen_toks": 4})
    assert texts(mine, asked) == texts(other, asked)


def test_a_tokenizer_that_names_no_tokens_leaves_them_to_the_model(small_artifact: Artifact, tmp_path: Path) -> None:
    model = ArtifactLM(edited(small_artifact, tmp_path, bos_token="<|unknown|>", eos_token=None))
    assert (model.prefix_token_id, model.eot_token_id) == (2, 2)  # a token that the model has no row for is none


TEMPLATES = {
    "accepts": "",
    "refuses": REFUSES_SYSTEM,
    "undefined": "{% if messages[0]['role'] == 'system' %}{{ messages[0].tools.name }}{% endif %}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("system", [False, True], ids=["user", "system"])
@pytest.mark.parametrize("turn", [False, True], ids=["continued", "answered"])
def test_prompts_are_those_of_hf(
    kind: str, system: bool, turn: bool, small_artifact: Artifact, network: Any, tmp_path: Path
) -> None:
    folder = edited(small_artifact, tmp_path)
    rewrite(folder, "chat_template.jinja", TEMPLATES[kind] + TEMPLATE)
    history = [{"role": "user", "content": "hello"}]
    if system:
        history.insert(0, {"role": "system", "content": SYSTEM})
    mine = ArtifactLM(folder, max_length=64).apply_chat_template(history, add_generation_prompt=turn)
    assert mine == hf(network, folder).apply_chat_template(history, add_generation_prompt=turn)
    assert (SYSTEM in mine) is (system and kind == "accepts")


def test_a_template_that_refuses_every_turn_is_one_line(small_artifact: Artifact, tmp_path: Path) -> None:
    folder = edited(small_artifact, tmp_path)
    rewrite(folder, "chat_template.jinja", "{{ raise_exception('none\nof them') }}")
    with pytest.raises(H1ExportError, match="does not take this conversation") as caught:
        ArtifactLM(folder).apply_chat_template([{"role": "user", "content": "hello"}])
    assert "\n" not in str(caught.value)


def test_the_cache_of_requests_tells_templates_apart(small_artifact: Artifact, tmp_path: Path) -> None:
    folder = edited(small_artifact, tmp_path)
    before = ArtifactLM(folder).tokenizer_name
    assert before == ArtifactLM(folder).tokenizer_name
    assert before.startswith("copy-")
    rewrite(folder, "chat_template.jinja", "another")
    assert ArtifactLM(folder).tokenizer_name != before
