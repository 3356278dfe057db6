"""The artifact as a model of transformers, against transformers' own model on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, FalconH1ForCausalLM, TextStreamer
from transformers import pipeline as transformers_pipeline

import h1export
from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_folder, load_runner
from h1export.errors import H1ExportError
from h1export.integrations import transformers
from h1export.runtime.runner import Limits, Runner
from h1export.validate.accuracy.logits import relative_error

PROMPT = "def main(argv):\n    "
EXACT = 1e-5  # of the range, float32 against float32

Build = Callable[..., Artifact]


@pytest.fixture(scope="module")
def artifact(tiny: Path, build: Build) -> Artifact:
    return build(tiny)


@pytest.fixture(scope="module")
def model(artifact: Artifact) -> transformers.FalconH1ForCausalLM:
    return transformers.load(artifact.folder)


@pytest.fixture(scope="module")
def theirs(tiny: Path) -> Any:
    model_class: Any = FalconH1ForCausalLM
    return model_class.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(artifact: Artifact) -> Any:
    return AutoTokenizer.from_pretrained(artifact.folder, padding_side="left")


class Limited:
    """A Runner that says it can do less."""

    def __init__(self, runner: Runner[Any], **limits: Any) -> None:
        self._runner = runner
        self.limits = replace(runner.limits, **limits)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


def new_tokens(model: Any, encoded: Mapping[str, torch.Tensor], count: int, **how: Any) -> list[list[int]]:
    torch.manual_seed(0)
    with torch.no_grad():
        found = model.generate(**encoded, max_new_tokens=count, **how)
    return [row[encoded["input_ids"].shape[1] :] for row in found.tolist()]


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_k": 20, "num_return_sequences": 2},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    ],
    ids=["greedy", "sampled", "beams"],
)
def test_tokens_are_those_of_transformers(how: dict[str, Any], model: Any, theirs: Any, tokenizer: Any) -> None:
    encoded = tokenizer(PROMPT, return_tensors="pt")
    found = new_tokens(model, encoded, 6, **how)
    assert found == new_tokens(theirs, encoded, 6, **how)
    assert len(found[0]) == 6


def test_tokens_without_a_cache_are_the_same(model: Any, tokenizer: Any) -> None:
    encoded = tokenizer(PROMPT, return_tensors="pt")
    assert new_tokens(model, encoded, 6, do_sample=False, use_cache=False) == new_tokens(
        model, encoded, 6, do_sample=False
    )


def test_int4_tokens_are_those_of_transformers_on_the_weights_it_stores(
    tiny: Path, build: Build, tokenizer: Any
) -> None:
    model: Any = transformers.load(build(tiny, "int4").folder)
    model_class: Any = FalconH1ForCausalLM
    loaded = model_class.from_pretrained(tiny, dtype=torch.float32).eval()
    parameters = dict(loaded.named_parameters())
    with torch.no_grad():
        for name, weight in model.runner.stored_weights().items():
            parameters[name].copy_(torch.from_numpy(weight))
    encoded = tokenizer(PROMPT, return_tensors="pt")
    assert new_tokens(model, encoded, 6, do_sample=False) == new_tokens(loaded, encoded, 6, do_sample=False)


TEXTS = ("import os", PROMPT, "class A(B):\n    def f(self):\n        return self.")


@pytest.mark.parametrize("limits", [{}, {"max_batch": 1}], ids=["one batch", "row by row"])
def test_rows_of_a_padded_batch_are_the_rows_alone(limits: dict[str, Any], model: Any, tokenizer: Any) -> None:
    """transformers' padded batches leak pads into the convolution, so the truth is each row alone."""
    limited = transformers.FalconH1ForCausalLM(model.config, Limited(model.runner, **limits))  # type: ignore[arg-type]
    limited.generation_config = model.generation_config
    rows = new_tokens(limited, tokenizer(list(TEXTS), padding=True, return_tensors="pt"), 8, do_sample=False)
    alone = [new_tokens(model, tokenizer(text, return_tensors="pt"), 8, do_sample=False)[0] for text in TEXTS]
    assert rows == alone


@pytest.mark.parametrize("limits", [{}, {"max_batch": 1}], ids=["one batch", "row by row"])
def test_a_long_padded_prompt_goes_in_pieces(limits: dict[str, Any], model: Any) -> None:
    """Prompts longer than a call of the prefill, one row with more pads than such a call has tokens."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(2, 4096, (2, 700)))
    mask = torch.ones_like(ids)
    mask[1, :600] = 0
    limited: Any = transformers.FalconH1ForCausalLM(model.config, Limited(model.runner, **limits))  # type: ignore[arg-type]
    found = limited(ids, mask, logits_to_keep=2).logits.numpy()
    for row, pad in enumerate((0, 600)):
        alone = model(ids[row : row + 1, pad:]).logits[:, -2:].numpy()
        assert relative_error(found[row : row + 1], alone) <= EXACT


def test_logits_of_all_positions_are_those_of_transformers(model: Any, theirs: Any, tokenizer: Any) -> None:
    ids = tokenizer(TEXTS[2], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        truth = theirs(ids).logits.numpy()
    assert relative_error(model(ids).logits.numpy(), truth) <= EXACT
    assert np.array_equal(model(ids, return_dict=False)[0], model(ids).logits)


def test_a_streamer_gets_the_text(model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    encoded = tokenizer(PROMPT, return_tensors="pt")
    (ids,) = new_tokens(model, encoded, 12, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"


def test_a_pipeline_of_transformers_runs(
    artifact: Artifact, model: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    generator: Any = transformers_pipeline("text-generation", model=model, tokenizer=str(artifact.folder))
    answers = generator(list(TEXTS[:2]), max_new_tokens=6, do_sample=False, batch_size=2)
    for text, (answer,) in zip(TEXTS, answers, strict=False):
        (ids,) = new_tokens(model, tokenizer(text, return_tensors="pt"), 6, do_sample=False)
        assert answer["generated_text"] == text + tokenizer.decode(ids)
    assert "is not supported" not in caplog.text


def test_end_tokens_are_the_artifacts(model: Any, tokenizer: Any) -> None:
    assert model.generation_config.eos_token_id == [1, 3]
    ids = tokenizer(PROMPT, return_tensors="pt")
    first = new_tokens(model, ids, 1, do_sample=False)[0][0]
    assert new_tokens(model, ids, 8, do_sample=False, eos_token_id=first) == [[first]]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"state": 1}, "state of another call"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "pad on the left"),
    ],
)
def test_what_a_runner_has_not_is_refused(how: dict[str, Any], says: str, model: Any) -> None:
    with pytest.raises(H1ExportError, match=says):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, **how)


@pytest.mark.parametrize(
    "how",
    [
        {"prompt_lookup_num_tokens": 2},
        {"past_key_values": object()},
        {"cache": object()},
        {"inputs_embeds": torch.zeros(1, 3, 256)},
    ],
)
@pytest.mark.filterwarnings("ignore:.past_key_values.:FutureWarning")
def test_what_transformers_refuses_for_us(how: dict[str, Any], model: Any) -> None:
    with pytest.raises(
        ValueError, match=r"not supported with stateful|not used by the model|doesn't have its forwarding"
    ):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, **how)


def test_an_artifact_with_last_logits_generates_and_says_what_it_has_not(
    tiny: Path, earlier_build: Build, model: Any
) -> None:
    last: Any = transformers.load(earlier_build(tiny).folder)
    ids = torch.tensor([[5, 6, 7]])
    assert last.generate(ids, max_new_tokens=4).tolist() == model.generate(ids, max_new_tokens=4).tolist()
    with pytest.raises(H1ExportError, match="--logits all"):
        last(ids)
    with pytest.raises(H1ExportError, match="copy its folder"):
        model.save_pretrained("anywhere")


def test_load_gives_a_runner(artifact: Artifact) -> None:
    runner = h1export.load(str(artifact.folder))
    assert isinstance(runner.limits, Limits)
    ids = np.array([[5, 6, 7]])
    mask = np.ones((1, 3), np.int64)
    again = load_runner(artifact)
    assert np.array_equal(runner.step(ids, mask, runner.initial(1))[0], again.step(ids, mask, again.initial(1))[0])


def test_the_face_of_the_package_finds_what_it_offers() -> None:
    assert h1export.__getattr__("hf").load is transformers.load
    assert h1export.__getattr__("load") is load_folder
    with pytest.raises(AttributeError, match="no attribute 'loads'"):
        h1export.loads  # type: ignore[attr-defined]  # noqa: B018
