"""The model `h1export` of lm-eval against lm-eval's own `hf` on the weights that the artifact stores, dequantised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval_requests import ROUNDING, SYSTEM, edited, hf, likelihoods, requests, texts

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.integrations.lm_eval import ArtifactLM


@pytest.fixture(scope="module")
def lines(tiny: Path) -> list[str]:
    return [line for line in (tiny / "heldout.txt").read_text(encoding="utf-8").splitlines() if len(line) > 40][:4]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> Path:
    """A task for each thing that lm-eval asks of a model, and some of the ways to ask for it."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {"text": line, "start": line[:20], "end": line[20:], "choices": [line[20:], line[:19:-1], " x", line[20:24]]}
        for line in lines
    ]
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(folder / "documents.jsonl")},
        "test_split": "train",
        "fewshot_split": "train",
    }
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{start}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    generate = {
        "output_type": "generate_until",
        "doc_to_text": "{{start}}",
        "doc_to_target": "{{end}}",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    greedy = {"do_sample": False, "temperature": 0.7, "num_beams": 1, "repetition_penalty": 1.0}
    kinds: dict[str, dict[str, Any]] = {
        "own_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": metric} for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
        "own_choice": choice,
        "own_choice_close": {**choice, "target_delimiter": "", "description": "Complete the line.\n"},
        "own_lines": {**generate, "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8}},
        "own_words": {**generate, "generation_kwargs": {"until": ["(", "self"], "max_new_tokens": 8, **greedy}},
    }
    for name, kind in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **kind}))
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, no cache of the user's."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chat": {"apply_chat_template": True},
    "multiturn": {
        "apply_chat_template": True,
        "system_instruction": SYSTEM,
        "num_fewshot": 1,
        "fewshot_as_multiturn": True,
    },
}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("way", WAYS)
def test_every_task_has_the_scores_of_hf(way: str, ours: ArtifactLM, theirs: HFLM, tasks: Path) -> None:
    """Sample by sample: the prompts and texts are equal, the likelihoods too, but for rounding."""
    names = sorted(path.stem for path in tasks.glob("*.yaml"))
    if WAYS[way].get("apply_chat_template"):
        names.remove("own_rolling")  # it has no prompt to frame
    found, truth = (
        lm_eval.simple_evaluate(
            model=model,
            tasks=names,
            task_manager=TaskManager(include_path=tasks, include_defaults=False),
            limit=2,
            bootstrap_iters=0,
            log_samples=True,
            **WAYS[way],
        )
        for model in (ours, theirs)
    )
    for name in names:
        for mine, other in zip(found["samples"][name], truth["samples"][name], strict=True):
            assert mine["arguments"] == other["arguments"]
            for answer, expected in zip(mine["resps"], other["resps"], strict=True):
                assert_equal(answer[0], expected[0])
        scores = {key: value for key, value in truth["results"][name].items() if not isinstance(value, str)}
        assert {key: found["results"][name][key] for key in scores} == pytest.approx(scores, rel=1e-4)
        assert scores


def assert_equal(answer: Any, expected: Any) -> None:
    if isinstance(expected, str):
        assert answer == expected
        return
    likelihood, greedy = answer if isinstance(answer, tuple) else (answer, None)
    wanted, same = expected if isinstance(expected, tuple) else (expected, None)
    assert likelihood == pytest.approx(wanted, abs=ROUNDING)
    assert greedy is same


PAIRS = [
    ("", "import sys"),
    ("", "<|start|>import"),
    ("<|start|>import", " sys"),
    ("import ", "sys"),
    ("import  \n", "sys"),
    ("import", " sys"),
    ("class A", ":\n    pass"),
    ("«é", "» ça"),
    ("x" * 700, "y"),  # longer than the limit
    ("x = 1\n" * 300, "y = 2\n" * 30),
]


def test_pairs_have_the_likelihoods_of_hf(ours: ArtifactLM, theirs: HFLM) -> None:
    for answer, expected in zip(likelihoods(ours, *PAIRS), likelihoods(theirs, *PAIRS), strict=True):
        assert answer == (pytest.approx(expected[0], abs=ROUNDING), expected[1])


def test_whole_texts_have_the_likelihoods_of_hf(small_artifact: Artifact, network: Any, tiny: Path) -> None:
    """Texts of no token, of one, of less than a window, of a whole one, and of several."""
    mine = ArtifactLM(small_artifact.folder, max_length=32)
    other = hf(network, small_artifact.folder, max_length=32)
    text = (tiny / "heldout.txt").read_text(encoding="utf-8")[:500]
    whole = next(text[:end] for end in range(len(text)) if len(mine.tok_encode(text[:end])) == 32)
    asked = requests(*((one,) for one in ("", "a", text[:40], whole, text, "<|start|>" + text)))
    found = mine.loglikelihood_rolling(asked, disable_tqdm=True)
    assert found == pytest.approx(other.loglikelihood_rolling(asked, disable_tqdm=True), abs=ROUNDING)


def test_what_hf_cannot_score_has_an_answer(ours: ArtifactLM) -> None:
    """A continuation without tokens is certain, and a context of spaces is none."""
    merged = next(
        (token[:-1], token[-1])
        for token in ours._tokenizer.vocabulary()
        if token.isascii() and len(ours.tok_encode(token)) == len(ours.tok_encode(token[:-1])) == 1
    )
    certain = (0.0, True)
    pairs = [("", ""), ("import", ""), ("", "<|start|>"), merged]
    assert likelihoods(ours, *pairs) == [certain] * len(pairs)
    spaces, same = likelihoods(ours, ("   ", "x"), ("", "   x"))
    assert spaces == same
    assert spaces[0] < 0


STOPS: list[dict[str, Any]] = [
    {},
    {"until": []},
    {"until": "\n"},
    {"until": ["<|turn|>", "<|end|>"]},
    {"until": ["»", "é"]},
    {"until": ["p"]},  # it begins in the prompt
    {"max_gen_toks": 1},
    {"max_gen_toks": 185},  # some prompts lose their beginning
    {"max_length": 24, "max_gen_toks": 40},
]


@pytest.mark.parametrize("options", STOPS, ids=repr)
@pytest.mark.parametrize("prompt", ["def main(argv):\n    ", "<|start|># é\n", "«"])
def test_texts_are_those_of_hf(prompt: str, options: dict[str, Any], ours: ArtifactLM, theirs: HFLM) -> None:
    asked = (prompt, {"max_gen_toks": 16, **options})
    assert texts(ours, asked) == texts(theirs, asked)


def test_every_stop_in_a_text_is_that_of_hf(ours: ArtifactLM, theirs: HFLM) -> None:
    """Stop strings cut out of what the model says: of one character, of several, and between tokens."""
    prompt = "def main(argv):\n    "
    (whole,) = texts(theirs, (prompt, {"max_gen_toks": 24}))
    assert len(set(whole)) > 4
    for start, length in ((0, 1), (1, 2), (3, 4), (5, 1), (2, 9)):
        asked = (prompt, {"max_gen_toks": 24, "until": [whole[start : start + length]]})
        assert texts(ours, asked) == texts(theirs, asked)


def test_end_tokens_are_those_of_hf(small_artifact: Artifact, network: Any, theirs: HFLM, tmp_path: Path) -> None:
    """Those of generation_config.json, special or not: the text of one that is not special stays, as in `hf`."""
    prompt = ("def main(argv):\n    ", {"max_gen_toks": 12})
    ids = theirs.tok_encode(texts(theirs, prompt)[0])
    mine = ArtifactLM(edited(small_artifact, tmp_path, file="generation_config.json", eos_token_id=[2, ids[3]]))
    kept = network.generation_config.eos_token_id
    network.generation_config.eos_token_id = [2, ids[3]]
    try:
        assert texts(mine, prompt) == texts(theirs, prompt)
    finally:
        network.generation_config.eos_token_id = kept


def test_a_prompt_without_tokens_is_the_prefix_token(ours: ArtifactLM) -> None:
    (found,) = texts(ours, ("", {"max_gen_toks": 6}))
    assert found == texts(ours, ("<|start|>", {"max_gen_toks": 6}))[0]
    assert found


def test_lengths_without_room_are_refused(ours: ArtifactLM) -> None:
    with pytest.raises(H1ExportError, match="max_length: 3 leaves no room after a prompt of"):
        texts(ours, ("def main(argv):\n    ", {"max_length": 3}))
    assert texts(ours, ("def", {"max_gen_toks": 0})) == [""]
