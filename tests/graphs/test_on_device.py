"""graphs/model.py itself on a CPU and on a GPU: eager, compiled, and decoding in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.graphs.model import FalconH1
from h1export.graphs.on_device import Decoder, empty_states, generate, load_model
from h1export.model.falcon_h1.config import FalconH1Config

CPU = torch.device("cpu")
PROMPT = 37  # longer than a chunk of the tests' models, and ragged
STEPS = 5
# of the largest logit: float32 sums in another order; 16-bit activations through the layers
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}

Load = Callable[..., FalconH1]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    device: torch.device = CPU if request.param == "cpu" else request.getfixturevalue("cuda")
    return device


@pytest.fixture(scope="module")
def load() -> Load:
    """load(checkpoint, device, dtype) -> its model."""

    def make(checkpoint: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> FalconH1:
        config = FalconH1Config.load(checkpoint)
        return load_model(WeightStore.open(checkpoint, config), config, device, dtype=dtype)

    return make


def tokens(model: FalconH1, batch: int = 2, count: int = PROMPT + STEPS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (batch, count), generator=generator)


@torch.no_grad()
def whole(model: FalconH1, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The logits of all positions by one call."""
    weight = model.lm_head.weight
    states = empty_states(model.config, len(ids), weight.device, dtype=weight.dtype)
    mask = torch.ones_like(ids) if mask is None else mask
    logits: torch.Tensor = model(ids.to(weight.device), mask.to(weight.device), states)[0]
    return logits


def deviation(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.cpu().float() - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def stepped(model: FalconH1, ids: torch.Tensor, mask: torch.Tensor, *, length: int) -> torch.Tensor:
    """The logits of the last STEPS positions by a prefill and a Decoder of ``length`` tokens."""
    weight = model.lm_head.weight
    ids = ids.to(weight.device)
    mask = mask.to(weight.device)[:, :-STEPS]
    states = empty_states(model.config, len(ids), weight.device, dtype=weight.dtype)
    _, states = model(ids[:, :-STEPS], mask, states)
    before = [tensor.clone() for layer in states for tensor in layer]
    decoder = Decoder(model, states, mask, length=length)
    logits = [decoder.step(ids[:, index : index + 1]) for index in range(ids.shape[1] - STEPS, ids.shape[1])]
    assert all(map(torch.equal, before, [tensor for layer in states for tensor in layer]))
    for _ in range(length - ids.shape[1]):
        decoder.step(ids[:, :1])
    with pytest.raises(H1ExportError, match=f"buffers of {length} tokens are full"):
        decoder.step(ids[:, :1])
    return torch.cat(logits, dim=1)


def test_every_switch_of_the_config_runs(checkpoint: Path, device: torch.device, load: Load) -> None:
    """A model without tiles for its sizes runs the reference on a GPU."""
    model = load(checkpoint, CPU)
    ids = tokens(model)
    expected = whole(model, ids)
    ones = torch.ones_like(ids)
    on_device = load(checkpoint, device)
    assert deviation(whole(on_device, ids), expected) < TOLERANCE[torch.float32]
    steps = stepped(on_device, ids, ones, length=ids.shape[1])
    assert deviation(steps, expected[:, -STEPS:]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_embedded_model_in_every_dtype(dtype: torch.dtype, device: torch.device, tiny: Path, load: Load) -> None:
    """The second row is left-padded; the Decoder's buffers are longer than what they hold."""
    ids = tokens(load(tiny, CPU))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    expected = whole(load(tiny, CPU), ids, mask)
    expected[1, :9] = 0  # pads' logits say nothing
    model = load(tiny, device, dtype)
    actual = whole(model, ids, mask)
    actual[1, :9] = 0
    assert actual.dtype == dtype
    assert deviation(actual, expected) < TOLERANCE[dtype]
    steps = stepped(model, ids, mask, length=ids.shape[1] + 11)
    assert deviation(steps, expected[:, -STEPS:]) < TOLERANCE[dtype]


def test_a_wrong_state_would_be_seen(device: torch.device, tiny: Path, load: Load) -> None:
    """A Decoder that starts from empty states, under a mask of real tokens, exceeds the tolerance."""
    model = load(tiny, device)
    ids = tokens(model).to(device)
    expected = whole(model, ids).cpu()
    empty = [
        tuple(torch.zeros_like(tensor) for tensor in layer)
        for layer in model(ids[:, :-1], torch.ones_like(ids[:, :-1]), _empty(model, ids))[1]
    ]
    logits = Decoder(model, empty, torch.ones_like(ids[:, :-1]), length=ids.shape[1]).step(ids[:, -1:])  # type: ignore[arg-type]
    assert deviation(logits, expected[:, -1:]) > 10 * TOLERANCE[torch.float32]


def test_more_tokens_than_the_buffers_hold_are_refused(tiny: Path, load: Load) -> None:
    model = load(tiny, CPU)
    ids = tokens(model)
    with pytest.raises(H1ExportError, match="42 tokens do not fit in 41"):
        Decoder(model, _empty(model, ids), torch.ones_like(ids), length=41)


def test_generate_is_the_argmax_of_the_whole(device: torch.device, tiny: Path, load: Load) -> None:
    model = load(tiny, device)
    ids = tokens(model, count=PROMPT).to(device)
    made = generate(model, ids, STEPS)
    assert made.shape == (2, STEPS)
    logits = whole(model, torch.cat([ids, made], dim=1))
    assert torch.equal(made, logits[:, PROMPT - 1 : -1].argmax(-1))
    assert torch.equal(generate(model, ids, 1), made[:, :1])


def test_compiled_is_eager(device: torch.device, tiny: Path, load: Load) -> None:
    """torch.compile takes the whole model as one graph: the ops stay opaque; on a GPU, Inductor compiles the rest."""
    model = load(tiny, device)
    ids = tokens(model).to(device)
    mask = torch.ones_like(ids)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        expected, states = model(ids, mask, _empty(model, ids))
        actual, after = compiled(ids, mask, _empty(model, ids))
    assert deviation(actual, expected.cpu()) < TOLERANCE[torch.float32]
    for layer, other in zip(after, states, strict=True):
        assert all(
            deviation(tensor, true.cpu()) < TOLERANCE[torch.float32] for tensor, true in zip(layer, other, strict=True)
        )


@pytest.mark.gpu
def test_compiled_with_cuda_graphs_is_eager(cuda: torch.device, tiny: Path, load: Load) -> None:
    """Decoding by mode reduce-overhead, whose first calls record what the later ones replay."""
    model = load(tiny, cuda)
    ids = tokens(model).to(cuda)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        _, states = model(ids[:, :-1], mask[:, :-1], _empty(model, ids))
        expected, _ = model(ids[:, -1:], mask, states)
        compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            assert deviation(compiled(ids[:, -1:], mask, states)[0], expected.cpu()) < TOLERANCE[torch.float32]


def _empty(model: FalconH1, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    return empty_states(model.config, len(ids), ids.device, dtype=model.lm_head.weight.dtype)
