"""Threads over the models of transformers and lm-eval: right results, or one line at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.integrations import transformers
from h1export.integrations.lm_eval import ArtifactLM

THREADS = 4


def test_transformers_generates_in_several_threads(small_artifact: Artifact) -> None:
    """Greedy, padded and beam searches at once, each as it is alone."""
    model: Any = transformers.load(small_artifact.folder, 1)
    ids = np.random.default_rng(0).integers(5, 300, (THREADS, 2, 9))
    mask = torch.ones((2, 9), dtype=torch.int64)
    mask[0, :4] = 0
    hows: tuple[dict[str, Any], ...] = ({}, {"num_beams": 2}, {"attention_mask": mask})

    def texts(number: int) -> list[Any]:
        found = []
        for how in hows:
            prompt = torch.from_numpy(ids[number])
            found.append(model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, **how).tolist())
        return found

    truth = [texts(number) for number in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(texts, range(THREADS))) == truth
    assert truth[0] != truth[1]


def test_a_state_of_transformers_takes_one_call(small_artifact: Artifact) -> None:
    model: Any = transformers.load(small_artifact.folder, 1)
    session: Any = transformers.open_session(model.runner, 1, 20)
    state = transformers.State(session)
    ids = torch.tensor([[7, 8, 9]])
    with session._one_call, pytest.raises(H1ExportError, match="session: is in use by another call"):
        model(ids, state=state)
    assert torch.equal(model(ids, state=state).logits, model(ids).logits)


def test_lm_eval_takes_one_list_of_requests(small_artifact: Artifact) -> None:
    model: Any = ArtifactLM(small_artifact.folder, 1)
    pair = [SimpleNamespace(args=("some text", " and more"))]
    text = [SimpleNamespace(args=("some text",))]
    options = [SimpleNamespace(args=("some text", {"until": ["x"], "max_gen_toks": 3}))]
    calls: dict[str, Callable[[], Any]] = {
        "loglikelihood": lambda: model.loglikelihood(pair, disable_tqdm=True),
        "loglikelihood_rolling": lambda: model.loglikelihood_rolling(text, disable_tqdm=True),
        "generate_until": lambda: model.generate_until(options, disable_tqdm=True),
    }
    truth = {name: call() for name, call in calls.items()}
    with model._one_call, ThreadPoolExecutor(1) as pool:
        for call in calls.values():
            with pytest.raises(H1ExportError, match="model of lm-eval: is in use by another call"):
                pool.submit(call).result(60)
    assert {name: call() for name, call in calls.items()} == truth
