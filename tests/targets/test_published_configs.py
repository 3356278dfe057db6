"""The published configs, with random weights of their shapes, on every target; layers and vocabulary are cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_configs import PUBLISHED
from transformers import FalconH1Config as TransformersConfig
from transformers import FalconH1ForCausalLM

from h1export.commands.build import build_artifact
from h1export.commands.load import load_runner
from h1export.commands.validate import validate_artifact
from h1export.quantize.scheme import QuantScheme
from h1export.report.checks import CheckKind
from h1export.runtime.generation import Sampling, generate
from h1export.targets import options_class, target_infos

CUT = {"num_hidden_layers": 1, "vocab_size": 1024}  # every other size is the published one
PROMPT = np.array([528, 449, 774, 404])
TIE = 1e-2  # of the range of the logits: fp16 activations move each of two by at most 5e-3
CONTEXT = 640  # tokens; targets with a fixed context need no more for the cases of `validate`


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoint_of(name) -> a checkpoint whose config.json is the published one but for CUT."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("published")
            config = PUBLISHED[name] | CUT
            torch.manual_seed(0)
            model: Any = FalconH1ForCausalLM(TransformersConfig.from_dict(dict(config)))
            model.to(torch.bfloat16).save_pretrained(made[name])
            (made[name] / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return made[name]

    return make


def behind(checkpoint: Path, tokens: list[int]) -> float:
    """Return how far the logits of ``tokens`` after PROMPT are behind the best, by transformers in float32.

    It is the largest distance, as a share of the range. Random models have near ties, so tokens need not be equal.
    """
    model: Any = FalconH1ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.tensor([[*PROMPT, *tokens]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(PROMPT) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    best, worst = logits.amax(1), logits.amin(1)
    return float(((best - chosen) / (best - worst)).max())


def cases() -> list[Any]:
    """Every config on every target."""
    pairs = [(name, target) for name in PUBLISHED for target in target_infos()]
    marks = {pair: [getattr(pytest.mark, pair[1])] for pair in pairs}
    for target in target_infos().keys() - {"ort"}:  # some take most of a minute
        marks["Falcon-H1-0.5B-Base", target].append(pytest.mark.slow)
    return [pytest.param(*pair, marks=marks[pair], id="-".join(pair)) for pair in pairs]


@pytest.mark.parametrize(("name", "target"), cases())
@pytest.mark.usefixtures("without_plugin")
def test_a_published_config_builds_validates_and_generates(
    name: str, target: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    own = options_class(target)
    fields = own.__dataclass_fields__
    chosen = {"max_context": CONTEXT, "runtime": "tensorrt"}  # whose engine is not built here
    options = own(**{key: value for key, value in chosen.items() if key in fields})
    scheme = QuantScheme("none")  # so that the tokens are PyTorch's, or tie with them
    artifact = build_artifact(checkpoint_of(name), target, tmp_path / "out", scheme=scheme, options=options)
    report = validate_artifact(tmp_path / "out", checkpoint_of(name), {}, latency_pairs=0, prompts=0)
    assert report.passed, [(row.case, row.figures) for row in report.rows]
    assert any(row.kind is CheckKind.CASE for row in report.rows)
    tokens = list(generate(load_runner(artifact), PROMPT, 4, sampling=Sampling(), eos=frozenset()))
    assert len(tokens) == 4
    assert behind(checkpoint_of(name), tokens) < TIE
    assert behind(checkpoint_of(name), [(token + 1) % CUT["vocab_size"] for token in tokens]) > TIE
