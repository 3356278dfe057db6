"""A toy language model that stands in for Core ML in the tests of the files for a Mac."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from h1export.targets.coreml.mac.golden import golden, lengths, logit_positions
from h1export.targets.coreml.mac.verify_on_mac import UNITS, Settings

VOCAB = 11

WIDTH = 6

CONTEXT = 40

CHUNK = 8

STEPS = 5

STATE = ("past_key_values_0_recurrent_state", "past_key_values_0_key")

RANDOM = np.random.default_rng(5)

TABLE, MIX, HEAD = (
    RANDOM.standard_normal(shape).astype(np.float32) for shape in ((VOCAB, WIDTH), (WIDTH, WIDTH), (2 * WIDTH, VOCAB))
)

TEXT = RANDOM.integers(1, VOCAB, CONTEXT + 1).astype(np.int64)


def advance(states: list[np.ndarray], token: int, position: int) -> np.ndarray:
    """Process a token and return its logits [VOCAB]; ``states`` change in place.

    The logits depend on the position and on the order of all tokens so far.
    """
    states[0][:] = np.tanh(TABLE[token] + MIX @ states[0] + np.sin(position / 3))
    states[1][:] = 0.9 * states[1] + states[0]
    return np.asarray(np.concatenate(states) @ HEAD, np.float32)


def zeros() -> list[np.ndarray]:
    return [np.zeros(WIDTH, np.float32), np.zeros(WIDTH, np.float32)]


@dataclass
class ToyFunction:
    """The toy in the place of a function of the package; it asserts every rule of README.md."""

    name: str
    settings: Settings
    unit: str = "CPU_ONLY"
    change: Callable[[np.ndarray], np.ndarray] = lambda logits: logits
    refuses: bool = False
    inputs: dict[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.width = self.settings.chunk if self.name == "prefill" else 1
        names = ["position", "n_valid"] if self.name == "prefill" else ["position"]
        states = STATE if self.settings.state_io else ()
        self.inputs = {"input_ids": (1, self.width), **dict.fromkeys(names, (1,)), **dict.fromkeys(states, (1, WIDTH))}

    def make_state(self) -> dict[str, Any]:
        return {"values": zeros(), "count": 0, "made by": self.name}

    def predict(self, feeds: Mapping[str, Any], state: Any = None) -> Mapping[str, Any]:
        assert {name: value.shape for name, value in feeds.items()} == self.inputs
        assert all(feeds[name].dtype == np.int32 for name in feeds if name not in STATE)
        assert (state is None) == self.settings.state_io
        ids = feeds["input_ids"][0]
        position = int(feeds["position"][0])
        count = int(feeds["n_valid"][0]) if self.width > 1 else 1
        assert 1 <= count <= self.width
        assert position + self.width <= self.settings.max_context, "out of room"
        assert not ids[count:].any()
        if self.refuses and state is not None and state["made by"] != self.name:
            raise RuntimeError("another function's state")
        values = [feeds[name][0].copy() for name in STATE] if state is None else state["values"]
        if state is not None:
            assert position <= state["count"], "tokens are missing before this call"
            state["count"] = position + count
        rows = [self.change(advance(values, int(token), position + k)) for k, token in enumerate(ids[:count])]
        logits = np.stack(
            [rows[-1]] if self.settings.last_logits else rows + [np.full(VOCAB, np.nan)] * (self.width - count)
        )[None]
        present = {
            name.replace("past_key_values", "present"): value[None] for name, value in zip(STATE, values, strict=True)
        }
        return {"logits": logits.astype(np.float16), **(present if state is None else {})}


def greedy(prompt: list[int], steps: int) -> list[int]:
    """Return the toy's own continuation, with logits rounded to fp16 as its functions do."""
    states = zeros()
    tokens = list(prompt)
    for position in range(len(prompt) + steps - 1):
        logits = advance(states, tokens[position], position).astype(np.float16)
        if position >= len(prompt) - 1:
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


SETTINGS = Settings(CONTEXT, CHUNK)

VARIANTS = {
    "states": SETTINGS,
    "state io": replace(SETTINGS, state_io=True),
    "last logits": replace(SETTINGS, last_logits=True),
    "both": replace(SETTINGS, state_io=True, last_logits=True),
    "one chunk": replace(SETTINGS, chunk=CONTEXT - 1),
}


def truth() -> np.ndarray:
    """The toy's logits after each token of TEXT."""
    states = zeros()
    return np.stack([advance(states, int(token), place) for place, token in enumerate(TEXT)])


def data(settings: Settings = SETTINGS, prompts: Sequence[int] | None = None, steps: int = STEPS) -> bytes:
    """Return golden.npz of the toy; None takes the prompts of a build."""
    found = lengths(settings.chunk, settings.max_context, len(TEXT), steps=steps) if prompts is None else prompts
    wanted = logit_positions(found, settings.chunk, steps) if found else []
    positions = [position for position in wanted if position < len(TEXT)]
    return golden(TEXT, truth()[positions], found, positions=positions, steps=steps)


def fake_coremltools(settings: Settings) -> ModuleType:
    """Return the part of coremltools 9 that the scripts use, with the toy as the model."""

    class MLModel(ToyFunction):
        def __init__(self, path: str, function_name: str, compute_units: str) -> None:
            assert path.endswith("model.mlpackage")
            super().__init__(function_name, settings, compute_units)

        def get_spec(self) -> Any:
            shapes = [
                (n, SimpleNamespace(multiArrayType=SimpleNamespace(shape=list(shape))))
                for n, shape in self.inputs.items()
            ]
            described = SimpleNamespace(
                name=self.name, input=[SimpleNamespace(name=n, type=kind) for n, kind in shapes]
            )
            return SimpleNamespace(description=SimpleNamespace(functions=[described], input=[]))

    class Units(dict[str, str]):
        __getattr__ = dict.__getitem__

    module: Any = ModuleType("coremltools")
    module.__version__ = "9.0"
    module.models = SimpleNamespace(MLModel=MLModel)
    module.ComputeUnit = Units({unit: unit for unit in UNITS})
    return module  # type: ignore[no-any-return]
