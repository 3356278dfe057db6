"""The training loop of tools/train_proxy.py: its schedule, its saved state, and its measure on held-out text.

The rate follows warm-up, stable, decay (arXiv:2405.18392). Only the decay makes a good model, and it can start from any
state of the stable phase, so a model can be had at any time and training still goes on from the stable state.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import FalconH1Config

from h1export.writing import write_file
from proxy.model import forward, init_weights

SEQ = 512
BATCH = 8  # windows a step on a CPU; a GPU needs more to be busy
EVAL_BATCH = 8
CHUNK = 32  # positions; an eighth more tokens a second than 64
PEAK = 2e-3
WARM_UP = 300  # steps
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.1
CLIP = 1.0
SAVE_SECONDS = 240
SHOW_STEPS = 100
EVAL_STEPS = 500
EVAL_WINDOWS = 64


@dataclass
class Run:
    """A model in training: weights, optimizer, and the place in the text.

    ``batch`` is the number of windows of SEQ tokens in a step, ``done`` counts windows since the start, ``decay_from``
    is where the decay starts or None in the stable phase, ``stop`` is where this phase ends, and ``seconds`` is the
    time spent.
    """

    cfg: FalconH1Config
    weights: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    seed: int
    text: str
    batch: int = BATCH
    done: int = 0
    step: int = 0
    seconds: float = 0.0
    decay_from: int | None = None
    stop: int = 0

    @property
    def ratio(self) -> float:
        """Tokens that were trained on, a parameter."""
        return self.done * SEQ / self.parameters

    @property
    def parameters(self) -> int:
        """The number of parameters; the tied head counts once."""
        return sum(p.numel() for p in self.weights.values())

    def windows(self, ratio: float) -> int:
        """Return the number of whole batches' windows that make ``ratio`` tokens a parameter."""
        return math.ceil(ratio * self.parameters / SEQ / self.batch) * self.batch

    def rate(self) -> float:
        """Return the learning rate of the next step: linear warm-up, constant, linear to zero."""
        rate = PEAK * min(1.0, (self.step + 1) / WARM_UP)
        if self.decay_from is not None:
            rate *= (self.stop - self.done) / (self.stop - self.decay_from)
        return rate

    def save(self, path: Path) -> None:
        """Write the state completely or not at all."""
        state = {
            "weights": {name: p.detach() for name, p in self.weights.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        state |= {name: getattr(self, name) for name in KEPT}
        stream = io.BytesIO()
        torch.save(state, stream)
        write_file(path, stream.getvalue())

    def load(self, path: Path) -> None:
        """Take up the state of ``path``; its seed and text must be those of this run."""
        if not path.is_file():
            raise SystemExit(f"train_proxy: {path}: no such state; `train` keeps one every --keep tokens a parameter")
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name in ("seed", "text"):
            if state[name] != getattr(self, name):
                raise SystemExit(f"train_proxy: {path}: made with another {name}; use it, or start in a new folder")
        with torch.no_grad():
            for name, p in self.weights.items():
                p.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in KEPT:
            setattr(self, name, state[name])


KEPT = ("seed", "text", "batch", "done", "step", "seconds", "decay_from", "stop")


def start(cfg: FalconH1Config, *, seed: int, text: str, device: str, batch: int = BATCH) -> Run:
    """Return a run at its first step; ``text`` is the hash of the training ids."""
    weights = {name: p.detach().to(device).requires_grad_() for name, p in init_weights(cfg, seed).items()}
    groups = [
        {"params": [p for p in weights.values() if p.ndim == 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in weights.values() if p.ndim != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=BETAS, eps=1e-9, fused=True)
    return Run(cfg, weights, optimizer, seed, text, batch)


def batches(ids: np.ndarray, *, seed: int, done: int, batch: int) -> Iterator[Tensor]:
    """Yield endless [batch, SEQ + 1] int64 windows, from the window ``done`` on.

    Each epoch tiles the text from another offset in another order, both drawn from seed and epoch alone.
    """
    tiles = len(ids) // SEQ - 1
    per_epoch = tiles // batch * batch
    epoch = done // per_epoch
    first = done % per_epoch
    while True:
        rng = np.random.default_rng([seed, epoch])
        offset = int(rng.integers(SEQ))
        order = rng.permutation(tiles)[:per_epoch]
        for at in range(first, per_epoch, batch):
            rows = [ids[offset + i * SEQ : offset + i * SEQ + SEQ + 1] for i in order[at : at + batch]]
            yield torch.from_numpy(np.stack(rows).astype(np.int64))
        epoch += 1
        first = 0


def nats(run: Run, ids: Tensor, dtype: torch.dtype, *, reduction: str = "mean") -> Tensor:
    """Return the loss of the windows ids [B, SEQ + 1] in nats."""
    logits = forward(run.cfg, run.weights, ids[:, :-1], chunk=CHUNK, dtype=dtype)
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def held_out(run: Run, ids: np.ndarray, widths: np.ndarray, *, dtype: torch.dtype) -> float:
    """Return bits a byte on EVAL_WINDOWS windows, evenly spread over the held-out ids; widths are bytes by id."""
    device = next(iter(run.weights.values())).device
    starts = np.linspace(0, len(ids) - SEQ - 1, EVAL_WINDOWS).astype(int)
    windows = np.stack([ids[i : i + SEQ + 1] for i in starts]).astype(np.int64)
    total = sum(
        nats(run, part.to(device), dtype, reduction="sum").item()
        for part in torch.from_numpy(windows).split(EVAL_BATCH)
    )
    return total / math.log(2) / int(widths[windows[:, 1:]].sum())


def show(line: str) -> None:
    """Print a line of the log at once."""
    print(time.strftime("%H:%M:%S"), line, flush=True)


def train(
    run: Run,
    train_ids: np.ndarray,
    state: Path,
    *,
    measure: Callable[[Run], float],
    dtype: torch.dtype = torch.float32,
    keep: int = 0,
    log: Callable[[str], None] = show,
) -> None:
    """Train ``run`` to its stop, saving to ``state`` every SAVE_SECONDS and at the end.

    With ``keep``, the state of every ``keep`` tokens a parameter is also written beside it, so that a decay can start
    there later. ``measure`` returns the held-out bits a byte.
    """
    device = next(iter(run.weights.values())).device
    params = list(run.weights.values())
    began = time.monotonic() - run.seconds
    saved = time.monotonic()
    shown = (run.seconds, run.done)
    losses: list[Tensor] = []
    for ids in batches(train_ids, seed=run.seed, done=run.done, batch=run.batch):
        if run.done >= run.stop:
            break
        for group in run.optimizer.param_groups:
            group["lr"] = run.rate()
        loss = nats(run, ids.to(device), dtype)
        run.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, CLIP)
        run.optimizer.step()
        before = run.ratio
        run.done += run.batch
        run.step += 1
        losses.append(loss.detach())
        if run.step % SHOW_STEPS == 0 or run.done >= run.stop:
            mean = torch.stack(losses).mean().item()
            if not math.isfinite(mean):
                raise SystemExit(f"train_proxy: step {run.step}: the loss is {mean}; go back to a kept state")
            run.seconds = time.monotonic() - began
            speed = (run.done - shown[1]) * SEQ / (run.seconds - shown[0])
            shown = (run.seconds, run.done)
            losses = []
            log(f"step {run.step} tokens/param {run.ratio:.2f} loss {mean:.4f} nats, {speed:.0f} tokens/s")
        if run.step % EVAL_STEPS == 0 or run.done >= run.stop:
            log(f"step {run.step} tokens/param {run.ratio:.2f} held-out {measure(run):.4f} bits/byte")
        if keep and run.ratio // keep > before // keep:
            run.save(state.with_name(f"{state.stem}-{int(run.ratio // keep * keep)}{state.suffix}"))
        if time.monotonic() - saved > SAVE_SECONDS or run.done >= run.stop:
            run.seconds = time.monotonic() - began
            run.save(state)
            saved = time.monotonic()
