"""lm-evaluation-harness on an artifact, with tasks over the held-out text that ships with the package; no network."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
import yaml
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows
from transformers import FalconH1ForCausalLM

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.tokenizer import load_tokenizer
from h1export.cli import run
from h1export.errors import H1ExportError
from h1export.integrations.lm_eval import ArtifactLM, evaluate
from h1export.runtime.generation import Sampling, generate
from h1export.serve.model import Room
from h1export.serve.server import Place, Server
from h1export.validate.accuracy.perplexity import WINDOW, Scored, text_figures, windows

Build = Callable[..., Artifact]


@pytest.fixture(scope="module")
def artifact(tiny: Path, build: Build) -> Artifact:
    return build(tiny)


@pytest.fixture(scope="module")
def model(artifact: Artifact) -> ArtifactLM:
    return ArtifactLM(artifact.folder)


@pytest.fixture(scope="module")
def theirs(tiny: Path) -> Callable[[np.ndarray[Any, Any]], torch.Tensor]:
    """Log probabilities [seq, vocab] of ids [seq], by transformers."""
    model_class: Any = FalconH1ForCausalLM
    loaded = model_class.from_pretrained(tiny, dtype=torch.float32).eval()

    def score(ids: np.ndarray[Any, Any]) -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(loaded(torch.from_numpy(ids)[None]).logits[0].double(), -1)

    return score


@pytest.fixture(scope="module")
def heldout(tiny: Path) -> str:
    return (tiny / "heldout.txt").read_text(encoding="utf-8")


def requests(*args: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=arg) for arg in args]


def text_of(tiny: Path, text: str, tokens: int) -> str:
    """The beginning of ``text`` that has so many tokens, and stays so when it is encoded again."""
    tokenizer = load_tokenizer(tiny)
    cut = text[: tokenizer.encode(text).offsets[tokens - 1][1]]
    assert len(tokenizer.encode(cut).ids) == tokens
    return cut


def test_rolling_is_a_plain_loop_of_transformers(model: ArtifactLM, theirs: Any, heldout: str) -> None:
    text = heldout[:3000]
    window = 300
    short = ArtifactLM(model._folder, max_length=window)
    (found,) = short.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    truth = 0.0
    for seen, scored in get_rolling_token_windows(short.tok_encode(text), short.prefix_token_id, window, 1):
        rows = theirs(np.array(seen))[-len(scored) :]
        truth += float(rows[torch.arange(len(scored)), torch.tensor(scored)].sum())
    assert found == pytest.approx(truth, rel=1e-4)


def test_rolling_is_the_perplexity_of_validate(model: ArtifactLM, tiny: Path, heldout: str) -> None:
    """validate leaves out the first token, lm-eval puts a prefix before it; the text fills its windows: they agree."""
    text = text_of(tiny, heldout, 2 * WINDOW)
    (found,) = ArtifactLM(model._folder, max_length=WINDOW).loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    ids = np.array([model.prefix_token_id, *model.tok_encode(text)])
    runner = model.runner

    def score(window: np.ndarray[Any, Any]) -> Any:
        return runner.step(window[None, :-1], np.ones((1, len(window) - 1), np.int64), runner.initial(1))[0][0]

    nbytes = len(text.encode())
    answers = [(score(window), window) for window in windows(ids)]
    figures = text_figures((Scored.of(logits, logits, window) for logits, window in answers), nbytes)
    assert -found / math.log(2) / nbytes == pytest.approx(figures["artifact"], rel=1e-4)


CONTEXT = "import os\n\ndef main("
CHOICES = ("argv", "argv=None):\n    ", "self", "")


def test_likelihoods_are_those_of_transformers(model: ArtifactLM, theirs: Any) -> None:
    pairs = [(CONTEXT, choice) for choice in CHOICES] + [("", "import sys"), ("class A", ":\n")]
    found = model.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, continuation), (likelihood, greedy) in zip(pairs, found, strict=True):
        before = model.tok_encode(context) or [model.prefix_token_id]
        after = model.tok_encode(context + continuation)[len(before) if context else 0 :]
        rows = theirs(np.array(before + after))[len(before) - 1 : -1] if after else torch.zeros(0, 1)
        assert likelihood == pytest.approx(
            float(rows[torch.arange(len(after)), torch.tensor(after, dtype=torch.long)].sum()), abs=1e-3
        )
        assert greedy is bool((rows.argmax(-1) == torch.tensor(after, dtype=torch.long)).all())


def test_last_logits_are_enough_and_long_contexts_lose_their_beginning(
    model: ArtifactLM, tiny: Path, earlier_build: Build, heldout: str
) -> None:
    last = ArtifactLM(earlier_build(tiny).folder, max_length=40)
    pair = (heldout[:800], heldout[800:840])
    context, continuation = last._encode_pair(*pair)
    (found,) = last.loglikelihood(requests(pair), disable_tqdm=True)
    (truth,) = model._loglikelihood_tokens([(None, context[len(continuation) - 41 :], continuation)], disable_tqdm=True)
    assert len(context) > 41 - len(continuation) > 0
    assert found[0] == pytest.approx(truth[0], rel=1e-5)
    with pytest.raises(H1ExportError, match="room for 40"):
        last.loglikelihood(requests((heldout[:10], heldout[10:800])), disable_tqdm=True)


def test_generation_stops_at_what_a_task_says(model: ArtifactLM) -> None:
    prompt = "def main(argv):\n    "
    ids = np.array(model.tok_encode(prompt))
    whole = model._tokenizer.decode(
        list(generate(model.runner, ids, 30, sampling=Sampling(), eos=frozenset(model._special.eos)))
    )
    term = whole[5:8]
    options: list[dict[str, Any]] = [
        {"max_gen_toks": 30},
        {"max_gen_toks": 30, "until": [term]},
        {"max_gen_toks": 1000, "until": term},
    ]
    found = model.generate_until(requests(*((prompt, option) for option in options)), disable_tqdm=True)
    assert found == [whole, whole.split(term)[0], whole.split(term)[0]]
    sampled = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    one, other = model.generate_until(requests((prompt, sampled), (prompt, sampled)), disable_tqdm=True)
    assert one != other  # each request has its own seed
    with pytest.raises(H1ExportError, match="num_beams"):
        model.generate_until(requests((prompt, {"num_beams": 2})), disable_tqdm=True)
    with pytest.raises(H1ExportError, match="room for"):
        model.generate_until(requests((prompt, {"max_gen_toks": 5000})), disable_tqdm=True)


def test_it_is_registered(artifact: Artifact) -> None:
    made: Any = get_model("h1export").create_from_arg_string(
        f"out={artifact.folder},max_length=64", {"batch_size": 1, "device": "cpu"}
    )
    assert (type(made), made.max_length) == (ArtifactLM, 64)


def test_chat_template(model: ArtifactLM) -> None:
    prompt = model.apply_chat_template([{"role": "user", "content": "hello"}])
    assert "hello" in prompt
    assert prompt.endswith("assistant\n")
    assert model.chat_template(True)
    assert model.tokenizer_name.startswith(f"{model._folder.name}-")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, heldout: str) -> Path:
    """Three tasks, one for each thing that lm-eval asks of a model."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [line for line in heldout.splitlines() if len(line) > 40][:4]
    documents = [
        {"text": line, "start": line[:20], "end": line[20:], "choices": [line[20:], line[:19:-1]]} for line in lines
    ]
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(folder / "documents.jsonl")},
        "test_split": "train",
    }
    kinds: dict[str, dict[str, Any]] = {
        "heldout_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "heldout_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{start}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": 0,
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        "heldout_continue": {
            "output_type": "generate_until",
            "doc_to_text": "{{start}}",
            "doc_to_target": "{{end}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
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


@pytest.mark.usefixtures("offline")
def test_the_command_runs_local_tasks(
    artifact: Artifact, tasks: Path, model: ArtifactLM, capsys: pytest.CaptureFixture[str]
) -> None:
    names = "heldout_rolling,heldout_choice,heldout_continue"
    assert run(["eval", str(artifact.folder), "--tasks", names, "--include", str(tasks), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    texts = [json.loads(line)["text"] for line in (tasks / "documents.jsonl").read_text().splitlines()]
    nats = -sum(model.loglikelihood_rolling(requests(*((text,) for text in texts)), disable_tqdm=True))
    nbytes = sum(len(text.encode()) for text in texts)
    assert found["heldout_rolling"]["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / nbytes)
    assert found["heldout_choice"]["acc,none"] == 1.0  # a line's end against the same backwards
    assert 0 <= found["heldout_continue"]["exact_match,none"] <= 1


@pytest.fixture(scope="module")
def server(artifact: Artifact) -> Iterator[Server]:
    made = Server({"tiny": artifact.folder}, Place(port=0), Room(4, 12, 0), threads=1)
    thread = Thread(target=made.run)
    thread.start()
    yield made
    made.stop()
    thread.join()


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("batch", "together"), [(3, 1), (1, 3)], ids=["batches", "concurrent"])
def test_local_completions_of_the_server_gives_the_same_scores(
    batch: int, together: int, server: Server, artifact: Artifact, tasks: Path, model: ArtifactLM
) -> None:
    """lm-eval's own client of OpenAI's API; log probabilities of prompts come by `echo`."""
    names = ["heldout_rolling", "heldout_choice", "heldout_continue"]
    ours = evaluate(model, names, tasks, fewshot=None, limit=None, chat=False, unsafe_code=False)
    asked = {
        "model": "tiny",
        "base_url": f"{server.url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(artifact.folder),
        "batch_size": batch,
        "num_concurrent": together,
        "max_retries": 1,
    }
    theirs = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=asked,
        tasks=names,
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        bootstrap_iters=0,
    )
    rows = {name: [sample["filtered_resps"] for sample in theirs["samples"][name]] for name in names}
    for name, metric in zip(names, ("bits_per_byte", "acc", "exact_match"), strict=True):
        found, expected = (one["results"][name][f"{metric},none"] for one in (theirs, ours))
        assert found == pytest.approx(expected, rel=1e-5), name
    documents = [json.loads(line) for line in (tasks / "documents.jsonl").read_text().splitlines()]
    pairs = [(document["start"], choice) for document in documents for choice in document["choices"]]
    scores = [score for row in rows["heldout_choice"] for score in row]
    for (found, greedy), (likelihood, is_greedy) in zip(
        scores, model.loglikelihood(requests(*pairs), disable_tqdm=True), strict=True
    ):
        assert (found, greedy) == (pytest.approx(likelihood, abs=1e-3), is_greedy)
    asked_texts = [(document["start"], {"until": ["\n"], "max_gen_toks": 8}) for document in documents]
    assert [text for (text,) in rows["heldout_continue"]] == model.generate_until(
        requests(*asked_texts), disable_tqdm=True
    )


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--gen-kwargs", "num_beams=1,repetition_penalty=1.0,seed=3"], 0, ""),
        (["--chat", "--system", "You complete programs.", "--gen-kwargs", "max_gen_toks=2"], 0, ""),
        (["--gen-kwargs", "num_beams=2"], 2, "num_beams: 2 would give another text"),
    ],
    ids=["neutral", "system", "beams"],
)
def test_the_command_takes_options_of_generation(
    options: list[str], code: int, said: str, artifact: Artifact, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(artifact.folder), "--tasks", "heldout_continue", "--include", str(tasks), "--limit", "1"]
    assert run([*words, "--quiet", *options]) == code
    assert said in capsys.readouterr().err


def test_an_unknown_task_is_refused(
    artifact: Artifact, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "h1export.integrations.lm_eval.TaskManager", partial(TaskManager, include_defaults=False)
    )  # all of them take 10 s
    assert run(["eval", str(artifact.folder), "--tasks", "heldout_choise", "--include", str(tasks)]) == 2
    assert "no such task: heldout_choise" in capsys.readouterr().err


def test_without_the_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["h1export.cli.evaluate"], "find_spec", lambda name: None)
    assert run(["eval", "anything", "--tasks", "x"]) == 2
    assert "pip install 'h1export[eval]'" in capsys.readouterr().err
