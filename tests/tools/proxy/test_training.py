"""The proxy's training learns, follows its schedule, and after a kill goes on as if there had been none."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from proxy import training
from transformers import FalconH1Config

SEQ = 32
BATCH = 4
IDS = np.tile(np.arange(20, 60, dtype=np.uint16), 40)  # 1600 ids, of which each says what the next one is


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"SHOW_STEPS": 1, "EVAL_STEPS": 1000}
    for name, value in (settings | {"SEQ": SEQ, "CHUNK": 8, "WARM_UP": 4, "PEAK": 1e-2}).items():
        monkeypatch.setattr(training, name, value)


def begin(cfg: FalconH1Config, steps: int) -> training.Run:
    run = training.start(cfg, seed=3, text="of the test", device="cpu", batch=BATCH)
    run.stop = steps * BATCH
    return run


def follow(run: training.Run, state: Path, *, kill_at: int | None = None) -> list[str]:
    """Train to the stop; with ``kill_at``, end in that step before its state is saved. Return the log."""
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        if line.startswith(f"step {kill_at} "):
            raise KeyboardInterrupt

    training.train(run, IDS, state, measure=lambda run: 1.5, log=log)
    return lines


def losses(lines: list[str]) -> list[float]:
    return [float(line.split(" loss ")[1].split()[0]) for line in lines if " loss " in line]


def test_the_loss_falls_and_the_log_has_the_held_out_figure(cfg: FalconH1Config, tmp_path: Path) -> None:
    lines = follow(begin(cfg, 60), tmp_path / "state.pt")
    assert losses(lines)[0] > 5
    assert losses(lines)[-1] < 3
    assert "held-out 1.5000 bits/byte" in lines[-1]


@pytest.mark.parametrize("decay_from", [None, 8])
def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(
    cfg: FalconH1Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decay_from: int | None
) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0)
    whole = begin(cfg, 12)
    whole.decay_from = decay_from
    lines = follow(whole, tmp_path / "whole.pt")
    killed = begin(cfg, 12)
    killed.decay_from = decay_from
    with pytest.raises(KeyboardInterrupt):
        follow(killed, tmp_path / "killed.pt", kill_at=7)
    again = begin(cfg, 12)
    again.load(tmp_path / "killed.pt")
    assert again.step == 6
    assert again.decay_from == decay_from
    assert losses(follow(again, tmp_path / "killed.pt")) == losses(lines)[6:]
    for name, p in whole.weights.items():
        assert torch.equal(p, again.weights[name]), name


def test_a_decay_starts_from_a_kept_state_and_ends_at_zero(
    cfg: FalconH1Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.Run, "parameters", 300)  # a batch is 0.43 tokens a parameter
    run = begin(cfg, 1)
    run.stop = run.windows(2.2)
    training.train(run, IDS, tmp_path / "stable.pt", measure=lambda run: 1.5, keep=1, log=lambda line: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stable-1.pt", "stable-2.pt", "stable.pt"]
    decayed = begin(cfg, 1)
    decayed.load(tmp_path / "stable-1.pt")
    assert 1 <= decayed.ratio < 1.43
    decayed.step = training.WARM_UP
    decayed.decay_from = decayed.done
    decayed.stop = decayed.done + 10 * BATCH
    rates = []
    for _ in range(10):
        rates.append(decayed.rate() / training.PEAK)
        decayed.done += BATCH
    assert rates == pytest.approx([1 - i / 10 for i in range(10)])
    assert decayed.rate() == 0


def test_the_rate_warms_up_and_stays(cfg: FalconH1Config) -> None:
    run = begin(cfg, 100)
    rates = []
    for run.step in (0, 1, 3, 4, 99):
        rates.append(run.rate() / training.PEAK)
    assert rates == [0.25, 0.5, 1, 1, 1]


@pytest.mark.parametrize("change", [{"seed": 4}, {"text": "another"}])
def test_a_state_of_another_seed_or_text_is_refused(
    cfg: FalconH1Config, tmp_path: Path, change: dict[str, object]
) -> None:
    run = begin(cfg, 1)
    run.save(tmp_path / "state.pt")
    for name, value in change.items():
        setattr(run, name, value)
    with pytest.raises(SystemExit, match=f"another {next(iter(change))}"):
        run.load(tmp_path / "state.pt")


def test_batches_go_on_at_any_place_and_each_epoch_reads_the_text_once_in_another_order() -> None:
    ids = np.arange(SEQ * 21, dtype=np.uint16)
    per_epoch = 20 // BATCH
    all_of = list(islice(training.batches(ids, seed=1, done=0, batch=BATCH), 3 * per_epoch))
    for done in (1, per_epoch - 1, per_epoch, per_epoch + 2):
        later = list(islice(training.batches(ids, seed=1, done=done * BATCH, batch=BATCH), 2))
        assert all(torch.equal(a, b) for a, b in zip(later, all_of[done : done + 2], strict=True))
    firsts = [torch.cat(all_of[i * per_epoch : (i + 1) * per_epoch])[:, 0].tolist() for i in range(3)]
    for starts in firsts:
        assert sorted(starts) == list(range(min(starts), min(starts) + len(starts) * SEQ, SEQ))
    assert firsts[0] != firsts[1] != firsts[2]


def test_held_out_bits_of_an_even_guess_are_those_of_the_vocabulary(cfg: FalconH1Config) -> None:
    run = begin(cfg, 1)
    with torch.no_grad():
        run.weights["model.embed_tokens.weight"].zero_()
    widths = np.full(cfg.vocab_size, 2)
    assert training.held_out(run, IDS, widths, dtype=torch.float32) == pytest.approx(np.log2(cfg.vocab_size) / 2)
