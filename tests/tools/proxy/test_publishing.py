"""A published proxy is a folder that transformers loads, with the figures of what is in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from proxy import corpus, publishing, training
from train_tiny import bits_per_byte
from transformers import AutoTokenizer, FalconH1Config, FalconH1ForCausalLM

TEXT = "def area(width, height):\n    return width * height\n" * 40


@pytest.fixture
def work(cfg: FalconH1Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a text and a state after one step of a decay."""
    (tmp_path / "source").mkdir()
    for name in ("train", "held"):
        (tmp_path / "source" / f"{name}.py").write_text(TEXT if name == "train" else TEXT.replace("area", "volume"))
    monkeypatch.setattr(corpus, "PACKAGES", ("train",))
    monkeypatch.setattr(corpus, "HELD_OUT_PACKAGES", ("held",))
    monkeypatch.setattr(corpus, "STDLIB", "absent")
    monkeypatch.setattr(corpus, "version", lambda package: "9.8")
    monkeypatch.setattr(corpus, "files_of", lambda package: list((tmp_path / "source").glob(f"{package}.py")))
    monkeypatch.setattr(publishing, "config", lambda: cfg)
    monkeypatch.setattr(publishing, "HELD_OUT_BYTES", 3000)
    monkeypatch.setattr(training, "SEQ", 64)
    work = tmp_path / "work"
    corpus.prepare(work / "text", cfg.vocab_size, 0)
    record = publishing.record_of(work)
    run = training.start(cfg, seed=0, text=record["train"]["sha256"], device="cpu")
    run.decay_from = 24
    (run.done, run.step, run.stop) = (32, 4, 32)
    run.save(work / "decay.pt")
    return work


def test_what_is_published_is_what_was_trained(cfg: FalconH1Config, work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    publishing.publish(work, "decay.pt", out)
    model = FalconH1ForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    record = publishing.record_of(work)
    run = training.start(cfg, seed=0, text=record["train"]["sha256"], device="cpu")
    run.load(work / "decay.pt")
    for name, p in publishing.stored(cfg, run.weights).items():
        assert torch.equal(model.state_dict()[name], p.bfloat16().float()), name
    held = (out / "heldout.txt").read_text()
    assert set(held.splitlines()) <= set((work / "text" / "heldout.txt").read_text().splitlines())
    card = (out / "README.md").read_text()
    assert f"**{bits_per_byte(model, AutoTokenizer.from_pretrained(out), held):.4f}**" in card
    assert "held 9.8" in card
    assert "last 25% of the tokens" in card
    assert f"{32 * 64:,} tokens" in card
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp")]


def test_a_folder_over_the_limit_leaves_nothing(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "SIZE_LIMIT", 20_000)
    with pytest.raises(SystemExit, match="bytes is over 20000"):
        publishing.publish(work, "decay.pt", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_excerpt_has_whole_lines_and_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "HELD_OUT_BYTES", 600)
    lines = [f"{i} {'x' * (i % 13)}" for i in range(500)]
    out = publishing.excerpt("\n".join(lines) + "\n")
    assert set(out.splitlines()) <= set(lines)
    assert 500 < len(out) <= 600
