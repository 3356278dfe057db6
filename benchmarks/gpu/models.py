"""Time decode and prefill of a whole model: ours, transformers', and ONNX Runtime's artifacts, as shares of the bound.

    PYTHONPATH=.:tools python -m benchmarks.gpu.models [--artifact FOLDER ...] [--budget 50] [--json FILE]

Ours is graphs/model.py in fp16 with the weights of transformers' random model, whose logits it must match first. The
bound is the time to read the weights, the keys, the values and the states once, or for prefill to multiply, at the
ceilings measured on this device. Decode is at a depth of 512 tokens.
transformers' cache grows by a token a step. Captured decode of an int4 artifact at batch 1 is required to take at most
twice the bound.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.gpu import ceilings, clock, results
from benchmarks.gpu.kernels import BATCHES, first_line
from benchmarks.make_checkpoint import config as shape_config
from gpu_host import dry
from gpu_host.captured import captured
from gpu_host.section import Row
from roofline import NARROW, WIDE, Gpu

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.graphs.model import FalconH1, layer_states
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateKind, StateSpec
from h1export.runtime.runner import Runner

SHAPE, DRY_SHAPE = "0.5B", "tiny-90M"
DEPTH, DRY_DEPTH = 512, 8
PREFILLS: Mapping[int, Sequence[int]] = {DEPTH: BATCHES, 4096: (1, 8)}  # tokens of a prompt -> batches
DRY_PREFILLS: Mapping[int, Sequence[int]] = {DRY_DEPTH: (1,), 20: (1,)}
INT4_SHARE = 0.5  # of the bound, which captured decode of int4 at batch 1 is required to reach
TOLERANCE = 5e-2  # of the largest logit, between two implementations in fp16
STEPS, ROUNDS = 16, 5
SESSIONS_SHARE = 0.6  # of the budget, after which no session of ONNX Runtime begins
THEIR_KERNELS = ("mamba_ssm", "causal_conv1d")  # packages whose kernels transformers takes where they are installed
COMPILE_S = 45  # torch.compile is left out when fewer seconds are left


@dataclass(frozen=True)
class Models:
    """The two PyTorch models with the same weights."""

    config: FalconH1Config
    ours: FalconH1
    theirs: Any
    device: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return self.ours.lm_head.weight.dtype


def make(device: str) -> Models:
    """Return transformers' model with random weights, and ours with the same."""
    on_cpu = device == "cpu"
    with dry.hidden(*THEIR_KERNELS) if on_cpu else nullcontext():
        from transformers import FalconH1Config as TheirConfig
        from transformers import FalconH1ForCausalLM

    settings = shape_config(DRY_SHAPE if on_cpu else SHAPE, 1 if on_cpu else None)
    dtype = torch.float32 if on_cpu else torch.float16
    torch.manual_seed(0)
    with torch.device(device):
        theirs = FalconH1ForCausalLM(TheirConfig(**settings)).eval().to(dtype)
        config = FalconH1Config.from_config(settings, Path("config.json"))
        ours = FalconH1(config, last_only=True).eval().to(dtype)
    missing = ours.load_state_dict(theirs.state_dict(), strict=False)
    if missing.missing_keys:
        raise RuntimeError(f"transformers' model has no {missing.missing_keys[0]}")
    for layer in ours.model.layers:  # the kernels take these in float32
        for name in ("A_log", "D", "dt_bias"):
            parameter = getattr(layer.mamba, name)
            parameter.data = parameter.data.float()
    return Models(config, ours, theirs, device)


def zero_states(models: Models, batch: int, past: int) -> list[Any]:
    """Return the states of every layer after ``past`` tokens of zeros."""
    tensors = [
        torch.zeros(
            tensor.sized(batch, past),
            device=models.device,
            dtype=torch.float32 if tensor.kind is StateKind.RECURRENT else models.dtype,
        )
        for tensor in StateSpec.of(models.config).tensors
    ]
    return layer_states(tensors)


def token_ids(models: Models, batch: int, tokens: int) -> torch.Tensor:
    """Return random token ids, int64 [batch, tokens]."""
    return torch.randint(0, models.config.vocab_size, (batch, tokens), device=models.device)


def decode_bytes(config: FalconH1Config, weights: int, batch: int, *, depth: int) -> int:
    """Return the bytes that one decode step moves at least: weights, keys and values read, states read and written."""
    moved = weights
    for tensor in StateSpec.of(config).tensors:
        size = int(np.prod(tensor.sized(batch, depth)))
        if tensor.kind in {StateKind.KEY, StateKind.VALUE}:
            moved += NARROW * size
        else:
            moved += 2 * (WIDE if tensor.kind is StateKind.RECURRENT else NARROW) * size
    return moved


def parameters(models: Models) -> int:
    """Return the parameters that a token is multiplied by: all but the embedding's rows."""
    head = models.ours.lm_head.weight  # which may be the embedding itself
    others = (p for p in models.ours.parameters() if p is not models.ours.model.embed_tokens.weight and p is not head)
    return head.numel() + sum(p.numel() for p in others)


def our_call(models: Models, batch: int, tokens: int, *, past: int) -> Callable[[], Any]:
    """Return one call of our model on ``tokens`` new tokens after ``past``."""
    ids = token_ids(models, batch, tokens)
    mask = torch.ones(batch, past + tokens, device=models.device, dtype=torch.int64)
    states = zero_states(models, batch, past)
    return lambda: models.ours(ids, mask, states)


def their_prefill(models: Models, batch: int, tokens: int) -> Callable[[], Any]:
    """Return one call of transformers' model on a prompt."""
    ids = token_ids(models, batch, tokens)
    return lambda: models.theirs(input_ids=ids, use_cache=True, logits_to_keep=1)


def their_decode(models: Models, batch: int, depth: int, *, forward: Callable[..., Any]) -> Callable[[], Any]:
    """Return one decode step of transformers' model, whose cache grows by a token with each."""
    cache = forward(input_ids=token_ids(models, batch, depth), use_cache=True, logits_to_keep=1).past_key_values
    ids = token_ids(models, batch, 1)
    return lambda: forward(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def disagreement(models: Models, tokens: int) -> float:
    """Return the largest difference of both models' last logits, relative to the largest logit."""
    ids = token_ids(models, 1, tokens)
    mask = torch.ones_like(ids)
    ours = models.ours(ids, mask, zero_states(models, 1, 0))[0]
    theirs = models.theirs(input_ids=ids, logits_to_keep=1).logits
    difference = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
    return difference if np.isfinite(difference) else float("inf")


def stream_timing(step: Callable[[], Any], device: str) -> clock.Timing:
    """Time a call that no CUDA graph can hold: several steps a sample, launched one by one."""

    def steps() -> None:
        for _ in range(count):
            step()

    count = 2 if device == "cpu" else STEPS
    step()
    samples = [clock.seconds(steps, device) / count for _ in range(2 if device == "cpu" else ROUNDS)]
    return clock.summary(samples, "wall clock" if device == "cpu" else "stream")


def fast_path() -> str:
    """Return what transformers says of its own kernels for this model."""
    from transformers.models.falcon_h1 import modeling_falcon_h1 as module

    flag = getattr(module, "is_fast_path_available", None)
    return "does not say whether its own kernels loaded" if flag is None else f"its own kernels loaded: {bool(flag)}"


def row(name: str, timing: clock.Timing, bound: float, *, device: str, detail: str = "") -> Row:
    """Return the row of a timing beside its bound in seconds."""
    figures = timing.figures() | {"bound_us": bound * 1e6, "bound_share": bound / timing.median}
    return Row(name, None, figures, "dry run: no figure" if device == "cpu" else detail)


def torch_rows(models: Models, gpu: Gpu, *, end: float) -> Iterator[Row]:
    """Yield decode at every batch and prefill at every length of both PyTorch models, the longest prompts last."""
    on_cpu = models.device == "cpu"
    depth = DRY_DEPTH if on_cpu else DEPTH
    label = DRY_SHAPE if on_cpu else SHAPE
    cases = [("decode", batch, depth) for batch in ((1,) if on_cpu else BATCHES)]
    for tokens, batches in (DRY_PREFILLS if on_cpu else PREFILLS).items():
        cases += [("prefill", batch, tokens) for batch in batches]
    for phase, batch, tokens in cases:
        name = f"{phase} {label} batch {batch} {'depth' if phase == 'decode' else 'tokens'} {tokens}"
        if time.monotonic() > end:
            yield Row(name, detail="left out: the budget was over")
        elif phase == "decode":
            yield from decode_rows(models, gpu, batch, depth=tokens, name=name, end=end)
        else:
            yield from prefill_rows(models, gpu, batch, tokens=tokens, name=name)


def own_row(call: Callable[[], Any], bound: float, *, name: str, device: str) -> Row:
    """Return the row of a call of our model."""
    times = clock.interleaved({name: [call]}, device, rounds=2 if device == "cpu" else 9)
    return row(f"{name}: h1export", times[name], bound, device=device)


def decode_rows(models: Models, gpu: Gpu, batch: int, *, depth: int, name: str, end: float) -> Iterator[Row]:
    """Yield one decode step of our model, and of transformers' eager and compiled."""
    bound = decode_bytes(models.config, NARROW * parameters(models), batch, depth=depth) / gpu.bandwidth
    device = models.device
    yield own_row(our_call(models, batch, 1, past=depth), bound, name=name, device=device)
    step = their_decode(models, batch, depth, forward=models.theirs)
    timing = stream_timing(step, device)
    yield row(f"{name}: transformers eager", timing, bound, device=device, detail=fast_path())
    yield from compiled_rows(models, batch, depth, bound=bound, name=name, end=end)


def prefill_rows(models: Models, gpu: Gpu, batch: int, *, tokens: int, name: str) -> Iterator[Row]:
    """Yield the prefill of a prompt by our model, and by transformers' eager one."""
    count = parameters(models)
    bound = max(NARROW * count / gpu.bandwidth, 2 * count * batch * tokens / gpu.tensor)
    device = models.device
    yield own_row(our_call(models, batch, tokens, past=0), bound, name=name, device=device)
    timing = stream_timing(their_prefill(models, batch, tokens), device)
    yield row(f"{name}: transformers eager", timing, bound, device=device, detail=fast_path())


def compiled_rows(models: Models, batch: int, depth: int, *, bound: float, name: str, end: float) -> Iterator[Row]:
    """Yield the decode of transformers' compiled model, or why there is none."""
    name = f"{name}: transformers compiled"
    if models.device == "cpu" or end - time.monotonic() < COMPILE_S:
        yield Row(name, detail="left out: torch.compile takes longer than what was left of the budget")
        return
    try:
        step = their_decode(models, batch, depth, forward=torch.compile(models.theirs, dynamic=True))
        yield row(name, stream_timing(step, models.device), bound, device=models.device)
    except Exception as why:  # the compiler may raise anything
        yield Row(name, detail=f"does not run: {type(why).__name__}: {first_line(why)}")


def artifact_rows(folder: Path, gpu: Gpu, device: str, *, end: float = math.inf) -> Iterator[Row]:
    """Yield the decode of an artifact at every batch, in a captured CUDA graph, and its kernels launched one by one.

    The bound counts the bytes of its weight file. No session begins after time.monotonic() ``end``.
    """
    artifact = Artifact.open(folder)
    weights = sum(file.stat().st_size for file in folder.glob("*.data"))
    int4 = any(weight.bits == 4 for weight in artifact.manifest.weights)
    for launched, each in (("captured", captured(artifact)), ("launched", artifact)):
        if time.monotonic() > end:
            yield Row(f"decode {folder.name} {launched}", detail="left out: the time of the sessions was over")
            continue
        runner = load_runner(each)
        for batch in BATCHES if device != "cpu" else (1,):
            name = f"decode {folder.name} batch {batch}"
            if runner.limits.max_batch is not None and batch > runner.limits.max_batch:
                yield Row(name, detail="left out: the artifact takes fewer rows")
                continue
            timing, depth = session_timing(runner, batch, device)
            bound = decode_bytes(runner.config, weights, batch, depth=depth) / gpu.bandwidth
            made = row(f"{name} depth {depth}: {runner.provenance.kernels}, {launched}", timing, bound, device=device)
            judged = launched == "captured" and int4 and batch == 1 and device != "cpu"
            yield replace(made, passed=bound / timing.median >= INT4_SHARE) if judged else made


def session_timing(runner: Runner[Any], batch: int, device: str) -> tuple[clock.Timing, int]:
    """Return the time of a session's step of one token a row, and the tokens before the first."""
    depth, steps, rounds = (DRY_DEPTH, 1, 2) if device == "cpu" else (DEPTH, STEPS, ROUNDS)
    session = runner.start(batch, depth + 1 + steps * rounds)
    rng = np.random.default_rng(0)
    vocab = runner.config.vocab_size
    session.append(rng.integers(0, vocab, (batch, depth)))
    ids = rng.integers(0, vocab, (batch, 1))
    session.append(ids)  # a captured graph is made here
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()  # append returns the logits on the CPU, so it has finished
        for _ in range(steps):
            session.append(ids)
        samples.append((time.perf_counter() - start) / steps)
    return clock.summary(samples, "wall clock"), depth


@torch.inference_mode()
def run(device: str, artifacts: Sequence[Path] = (), *, budget: float = 50.0, gpu: Gpu | None = None) -> Iterator[Row]:
    """Yield the rows of every model until ``budget`` seconds are over.

    Args:
        device: "cuda", or "cpu" for a dry run.
        artifacts: folders of artifacts for ONNX Runtime.
        budget: seconds after which no further model begins.
        gpu: the measured ceilings; None measures them.
    """
    end = time.monotonic() + budget
    gpu = gpu or ceilings.measure(device).gpu
    sessions_end = time.monotonic() + SESSIONS_SHARE * budget
    for folder in artifacts:
        try:
            yield from artifact_rows(folder, gpu, device, end=sessions_end)
        except Exception as why:  # a row must not end the section
            passed = None if device == "cpu" and dry.has_no_kernel(why) else False
            yield Row(f"decode {folder.name}", passed, detail=f"does not run: {type(why).__name__}: {first_line(why)}")
    models = make(device)
    found = disagreement(models, DRY_DEPTH)
    yield Row("h1export agrees with transformers", found <= TOLERANCE, {"relative_error": found})
    if found <= TOLERANCE:
        yield from torch_rows(models, gpu, end=end)


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, nargs="*", default=[], help="folders built with --graph cuda")
    parser.add_argument("--budget", type=float, default=50.0, help="seconds after which no further model begins")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    device = results.device()
    results.report(run(device, args.artifact, budget=args.budget), device, path=args.json)


if __name__ == "__main__":
    main()
