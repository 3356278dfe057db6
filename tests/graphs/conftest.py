"""Models under test beside transformers' FalconH1: everything traced, loaded or computed once a session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from program_runner import ProgramRunner, States

from h1export.checkpoint.store import WeightStore
from h1export.graphs.passes import Pass, run_passes
from h1export.graphs.passes.drop_metadata_asserts import DropMetadataAsserts
from h1export.graphs.program import Program
from h1export.graphs.trace import trace
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array

Snapshot = dict[str, Array]


@dataclass
class Reference:
    """transformers' FalconH1ForCausalLM in float32, by its full forward over an unpadded row.

    That path alone is right for every config: its cached decode ignores time_step_limit, and pads of its padded batches
    leak into rows where projections have biases.
    """

    folder: Path
    _known: dict[tuple[int, ...], tuple[Array, Snapshot]] = field(default_factory=dict)

    @cached_property
    def _model(self) -> Any:
        from transformers import FalconH1ForCausalLM

        return FalconH1ForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def __call__(self, tokens: Sequence[int]) -> tuple[Array, Snapshot]:
        """Returns logits [seq, vocab] and the last states by StateTensor.key, without the batch axis."""
        key = tuple(int(token) for token in tokens)
        if key not in self._known:
            with torch.no_grad():
                result = self._model(torch.tensor([key]), use_cache=True)
            self._known[key] = result.logits[0].numpy(), _states(result.past_key_values)
        return self._known[key]


def _states(cache: Any) -> Snapshot:
    states: Snapshot = {}
    for index, layer in enumerate(cache.layers):
        conv = layer.conv_states[0][..., 1:]  # transformers keeps one column more than a convolution needs
        for name, state in {
            "key": layer.keys,
            "value": layer.values,
            "conv_state": conv,
            "recurrent_state": layer.recurrent_states[0],
        }.items():
            states[f"{index}.{name}"] = state[0].numpy()
    return states


def apply(rewrite: Pass, program: Program) -> Program:
    """Returns a copy that went through one pass, without the verification that only the last pass makes hold."""
    edited = program.editable()
    rewrite.apply(edited)
    return edited.finished()


class Lab:
    """One checkpoint: its config, its weights, the traced program, the program after all passes, and the reference."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = FalconH1Config.load(folder)
        self.store = WeightStore.open(folder, self.config)
        self.reference = Reference(folder)
        self.tokens = np.random.default_rng(1).integers(1, self.config.vocab_size, 70)

    @cached_property
    def traced(self) -> Program:
        return trace(self.config)

    @cached_property
    def unfolded(self) -> Program:
        """The traced program, ready to run: torch.export's assertions insist on the meta device."""
        return apply(DropMetadataAsserts(), self.traced)

    @cached_property
    def passed(self) -> Program:
        return run_passes(self.traced)

    def runner(self, program: Program) -> ProgramRunner:
        return ProgramRunner(program, self.store)

    def run(self, program: Program, chunks: Sequence[int]) -> tuple[Array, Snapshot]:
        """Run a row in calls of so many tokens. Returns all logits, and the last states without the batch axis."""
        return _in_chunks(self.runner(program), self.tokens, chunks)


def _in_chunks(runner: ProgramRunner, tokens: Sequence[int], chunks: Sequence[int]) -> tuple[Array, Snapshot]:
    states: States = runner.initial(1)
    logits = []
    done = 0
    for chunk in chunks:
        ids = np.asarray(tokens[done : done + chunk], np.int64)[None]
        done += chunk
        new, states = runner.step(ids, np.ones((1, done), np.int64), states)
        logits.append(new[0])
    return np.concatenate(logits), {key: state[0] for key, state in runner.snapshot(states).items()}


@pytest.fixture(scope="session")
def lab_of() -> Callable[[Path], Lab]:
    """lab_of(folder) -> its Lab, made once."""
    made: dict[Path, Lab] = {}

    def make(folder: Path) -> Lab:
        if folder not in made:
            made[folder] = Lab(folder)
        return made[folder]

    return make


@pytest.fixture(scope="session")
def lab(checkpoint: Path, lab_of: Callable[[Path], Lab]) -> Lab:
    """One Lab per entry of SWITCHES."""
    return lab_of(checkpoint)


@pytest.fixture(scope="session")
def full_lab(make_checkpoint: Callable[..., Path], lab_of: Callable[[Path], Lab]) -> Lab:
    """One layer with every µP multiplier, every bias, the gated norm and two groups: whatever is dropped is missed."""
    return lab_of(make_checkpoint("all_biases", num_hidden_layers=1, mamba_rms_norm=True, mamba_n_groups=2))


@pytest.fixture(scope="session")
def apply_pass() -> Callable[[Pass, Program], Program]:
    """apply_pass(pass, program) -> a rewritten copy, unverified."""
    return apply


@pytest.fixture(scope="session")
def deviation() -> Callable[[tuple[Array, Snapshot], tuple[Array, Snapshot]], float]:
    """deviation((logits, states), (expected ones)) -> the worst tensor's largest error over its range."""

    def of(actual: Array, expected: Array) -> float:
        assert actual.shape == expected.shape
        return float(np.abs(actual.astype(np.float64) - expected).max() / np.ptp(expected))

    def measure(actual: tuple[Array, Snapshot], expected: tuple[Array, Snapshot]) -> float:
        assert actual[1].keys() == expected[1].keys()
        errors = [of(actual[0], expected[0]), *(of(actual[1][key], expected[1][key]) for key in expected[1])]
        return max(errors) if np.isfinite(errors).all() else np.inf

    return measure
