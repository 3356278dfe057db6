"""Generate many tokens with the embedded model, through h1export's own loop or through transformers'.

    python -m endurance.long ARTIFACT session|hf [TOKENS]

``long_context`` makes the checkpoint: the embedded model with more positions. Exit code 1: memory grows, the time of a
token grows faster than with the length, or the last logits are not those of a fresh run over all tokens.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

import h1export.hf
from endurance.steady import MIB, MOST_GROWTH, Held
from h1export.checkpoint.resolve import embedded_model
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateSpec
from h1export.runtime.generation import Sampling, generate
from h1export.runtime.session import open_session

PROMPT = np.arange(300, 316)
BLOCKS = 20  # of tokens, each timed as a whole
TOLERANCE = 1e-6  # of the range of the logits
SUPERLINEAR = 1.5  # times what a straight line through the first half says of the last quarter


def long_context(folder: Path, tokens: int) -> None:
    """Copy the embedded model, with room for so many positions; its rotary embedding has no other limit."""
    shutil.copytree(embedded_model(), folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": tokens}), "utf-8")


@dataclass
class Watch(BaseStreamer):
    """Notes the processor time and the memory at the end of each block of tokens.

    Attributes:
        block: The tokens of a block.
        written: Bytes of keys and values of a token. Their buffer is zeros at first, which take memory when written.
        tokens: All tokens so far.
        times: Seconds.
        memory: Bytes.
    """

    block: int
    written: int = 0
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=lambda: [time.process_time()])
    memory: list[int] = field(default_factory=list)

    def put(self, value: Any) -> None:
        """Take the prompt, or the next token."""
        if np.asarray(value).size != 1:
            return
        self.tokens.append(int(np.asarray(value).item()))
        if len(self.tokens) % self.block == 0:
            self.times.append(time.process_time())
            self.memory.append(Held.now().memory)

    def end(self) -> None:
        """Do nothing more."""

    @property
    def growth(self) -> float:
        """The growth of the memory after the first two blocks, beyond keys and values that were written since."""
        known = self.memory[1] + self.written * self.block * (len(self.memory) - 2)
        return self.memory[-1] / known - 1

    @property
    def bend(self) -> float:
        """The time of the last quarter's tokens, in that of a straight line through the first half's."""
        spent = np.diff(self.times)
        half = len(spent) // 2
        slope, start = np.polyfit(np.arange(1, half), spent[1:half], 1)
        last = np.arange(3 * len(spent) // 4, len(spent))
        return float(spent[last].mean() / (start + max(slope, 0) * last).mean())


class Recorded:
    """A Runner whose session's last logits are kept."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.last: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def start(self, batch: int, capacity: int) -> Any:
        """Open a session that notes its logits."""
        session = self._runner.start(batch, capacity)
        append = session.append

        def noted(ids: Any, *, keep: int | None = None) -> Any:
            found = append(ids, keep=keep)
            self.last = found[0, -1]
            return found

        session.append = noted
        return session


def session_tokens(artifact: Path, count: int, watch: Watch) -> Recorded:
    """Generate with h1export's loop."""
    runner: Any = Recorded(h1export.load(artifact, 1))
    for token in generate(runner, PROMPT, count, sampling=Sampling(), eos=frozenset()):
        watch.put([token])
    return runner


def hf_tokens(artifact: Path, count: int, watch: Watch) -> Recorded:
    """Generate with transformers' loop."""
    model: Any = h1export.hf.load(artifact, 1)
    model.runner = Recorded(model.runner)
    model.generation_config.eos_token_id = None
    prompt = torch.from_numpy(PROMPT)[None]
    out = model.generate(prompt, streamer=watch, max_new_tokens=count, do_sample=False)
    assert out[0, len(PROMPT) :].tolist() == watch.tokens
    return model.runner


def run(artifact: Path, how: str, count: int) -> tuple[str, bool]:
    """Return what was found, and whether it is right."""
    tensors = StateSpec.of(FalconH1Config.load(artifact)).tensors
    written = sum(4 * prod(tensor.sized(1, 1)) for tensor in tensors if tensor.kind.grows)
    watch = Watch(count // BLOCKS, written)
    runner = (hf_tokens if how == "hf" else session_tokens)(artifact, count, watch)
    last = runner.last
    ids = np.concatenate([PROMPT, watch.tokens])[:-1]
    fresh = open_session(runner, 1, len(ids)).append(ids[None], keep=1)[0, -1]
    difference = float(np.abs(last - fresh).max() / np.ptp(fresh))
    assert int(last.argmax()) == watch.tokens[-1]
    spent = np.diff(watch.times) / watch.block * 1e3
    text = (
        f"{count} tokens by {how}: memory {watch.memory[1] / MIB:.0f} to {watch.memory[-1] / MIB:.0f} MiB "
        f"({watch.growth:+.1%} beyond keys and values), {spent[1]:.2f} to {spent[-1]:.2f} ms of processor a token, "
        f"last quarter {watch.bend:.2f} of a straight line; last logits {difference:.1e} of the range from a fresh run"
    )
    right = watch.growth <= MOST_GROWTH and watch.bend <= SUPERLINEAR and difference <= TOLERANCE
    return text, right and len(watch.tokens) == count


def main(artifact: str, how: str, count: str = "20000") -> int:
    """Print what was found, and return the exit code."""
    text, right = run(Path(artifact), how, int(count))
    print(text)
    return int(not right)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
