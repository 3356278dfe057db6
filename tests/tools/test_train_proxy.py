"""The verbs of tools/train_proxy.py go from installed packages to a folder that transformers loads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import train_proxy
from proxy import corpus, model, publishing, training
from transformers import FalconH1Config, FalconH1ForCausalLM


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and a trainer whose model and text are small."""
    small = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "mamba_d_ssm": 32, "mamba_d_head": 4}
    cfg = FalconH1Config(**model.config().to_dict() | small | {"vocab_size": 300, "mamba_d_state": 8})
    for module in (train_proxy, publishing):
        monkeypatch.setattr(module, "config", lambda: cfg)
    for name, value in {"SEQ": 64, "BATCH": 2, "SHOW_STEPS": 4, "WARM_UP": 2, "EVAL_WINDOWS": 2}.items():
        monkeypatch.setattr(training, name, value)
    monkeypatch.setattr(training.Run, "parameters", 2000)
    for name, value in {"PACKAGES": ("click",), "HELD_OUT_PACKAGES": ("jinja2",)}.items():
        monkeypatch.setattr(corpus, name, value)
    files_of = corpus.files_of
    monkeypatch.setattr(corpus, "files_of", lambda package: [] if package == corpus.STDLIB else files_of(package))
    monkeypatch.setattr(corpus, "HELD_OUT", ("cmd",))
    monkeypatch.setattr(corpus, "PACKAGE_BYTES", 20_000)
    monkeypatch.setattr(publishing, "HELD_OUT_BYTES", 900)
    return tmp_path / "work"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train_proxy", *map(str, arguments)])
    train_proxy.main()


def test_text_train_decay_publish(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, "text", work)
    call(monkeypatch, "train", work, "--stop", 1.5, "--keep", 1)
    call(monkeypatch, "train", work, "--stop", 2.1, "--keep", 1, "--dtype", "float32")
    assert "stable.pt: goes on at step 24, 1.54 tokens a parameter" in capsys.readouterr().out
    stable = (work / "stable.pt").read_bytes()
    call(monkeypatch, "decay", work, "--start", 1, "--length", 0.5)
    states = {path.name for path in work.glob("*.pt")}
    assert states == {"stable.pt", "stable-1.pt", "stable-2.pt", "decay-1+0.5.pt"}
    assert (work / "stable.pt").read_bytes() == stable
    decayed = torch.load(work / "decay-1+0.5.pt", weights_only=True)
    assert (decayed["decay_from"], decayed["done"]) == (32, 48)
    call(monkeypatch, "publish", work, "--state", "decay-1+0.5.pt", tmp_path / "out")
    assert FalconH1ForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("train",), "run `text` first"), (("decay", "--length", 1, "--start", 7), r"stable-7\.pt: no such state")],
    ids=["no-text", "no-state"],
)
def test_what_is_missing_is_named(
    work: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], message: str
) -> None:
    if arguments[0] == "decay":
        (work / "text").mkdir(parents=True)
        (work / "text" / "text.json").write_text('{"train": {"sha256": "none"}}')
    with pytest.raises(SystemExit, match=message):
        call(monkeypatch, arguments[0], work, *arguments[1:])
