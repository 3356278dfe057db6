"""The forward pass that is trained is that of transformers."""

from __future__ import annotations

import re

import pytest
import torch
from proxy import model, publishing
from transformers import FalconH1Config

IDS = torch.arange(2 * 256).view(2, 256) * 7 % 320


@pytest.fixture
def weights(cfg: FalconH1Config) -> dict[str, torch.Tensor]:
    weights = model.init_weights(cfg, 5)
    gen = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in weights.values():
            p.mul_(1 + 0.3 * torch.rand(p.shape, generator=gen)).add_(0.05 * torch.randn(p.shape, generator=gen))
    return weights


def test_transformers_computes_what_was_trained(cfg: FalconH1Config, weights: dict[str, torch.Tensor]) -> None:
    released = publishing.released(cfg, weights, IDS)
    ours = model.forward(cfg, weights, IDS, chunk=32, dtype=torch.float32)
    assert (released(IDS).logits - ours).abs().max() < 1e-5
    assert ours.std() > 0.1


@pytest.mark.parametrize(
    "name", ["embed", "in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
)
def test_a_wrong_multiplier_is_noticed(
    cfg: FalconH1Config, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    right = publishing.stored(cfg, weights)
    tied = {"embed": "embed_tokens|lm_head"}.get(name, name)
    wrong = {key: value * 1.5 if re.search(tied, key) else value for key, value in right.items()}
    monkeypatch.setattr(publishing, "stored", lambda *_: wrong)
    with pytest.raises(SystemExit, match="differs by"):
        publishing.released(cfg, weights, IDS)


def test_bfloat16_products_stay_near(cfg: FalconH1Config, weights: dict[str, torch.Tensor]) -> None:
    exact = model.forward(cfg, weights, IDS, chunk=32, dtype=torch.float32)
    rough = model.forward(cfg, weights, IDS, chunk=32, dtype=torch.bfloat16)
    assert rough.dtype == torch.float32
    assert 0 < (exact - rough).abs().mean() < 0.02 * exact.std()


def test_the_proxy_has_whole_k_quant_rows_and_the_switches_of_the_published_small_models() -> None:
    cfg = model.config()
    weights = model.init_weights(cfg, 0)
    matrices = {name: p for name, p in weights.items() if p.ndim == 2}
    assert len(matrices) == 9 * cfg.num_hidden_layers + 1
    assert {p.shape[1] % 256 for p in matrices.values()} == {0}
    assert 2 * sum(p.numel() for p in weights.values()) < publishing.SIZE_LIMIT
    assert cfg.tie_word_embeddings
    assert not cfg.mamba_rms_norm
    assert not cfg.mamba_norm_before_gate
    assert cfg.mamba_conv_bias
