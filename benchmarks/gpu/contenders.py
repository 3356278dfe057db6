"""Kernels of ours and of peers that compute the same recurrence, each adapted to the same inputs.

A contender prepares its inputs outside the time: where a peer's op has no softplus, no D or no groups, the work is done
before or after, which favours the peer. flash-linear-attention's simple_gla is the recurrence of Mamba-2 with q = C,
k = B, v = dt x, a log decay of dt A and a scale of 1; it gets dt, the repeated groups and D x for free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from roofline import Shape
from torch import Tensor

Inputs = dict[str, Tensor]
Result = tuple[Tensor, Tensor]  # y and the new state
SCAN_TOLERANCE = 2e-2  # relative to the largest value: bf16 and fp16 states of the peers
CHUNK = 256  # mamba-ssm's chunk, its own default


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        name: such as "mamba-ssm".
        prepare: imports the implementation, and turns the inputs into those of its call.
        call: computes; this is what is timed.
        finish: turns the answer of ``call`` into the y and state of the op, given the inputs.
    """

    name: str
    prepare: Callable[[Inputs], Any]
    call: Callable[[Any], Any]
    finish: Callable[[Any, Any, Inputs], Result]


def scan_inputs(shape: Shape, batch: int, tokens: int, *, device: str, seed: int = 0) -> Inputs:
    """Return random inputs of h1::ssm_scan in fp16, with states and weights in float32."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    return {
        "x": normal(batch, tokens, shape.heads, shape.d_head).half(),
        "dt": normal(batch, tokens, shape.heads).half(),
        "A": -torch.exp(normal(shape.heads) * 0.7 + 1),
        "B": (normal(batch, tokens, shape.groups, shape.d_state) * 0.3).half(),
        "C": (normal(batch, tokens, shape.groups, shape.d_state) * 0.3).half(),
        "D": normal(shape.heads),
        "dt_bias": normal(shape.heads) * 1.5 - 2,
        "state": normal(batch, shape.heads, shape.d_head, shape.d_state),
        "mask": torch.ones(batch, tokens, device=device, dtype=torch.float16),
    }


def conv_inputs(shape: Shape, batch: int, tokens: int, *, device: str, seed: int = 0) -> Inputs:
    """Return random inputs of h1::causal_conv in fp16."""
    generator = torch.Generator(device=device).manual_seed(seed)
    sizes = {
        "x": (batch, tokens, shape.channels),
        "state": (batch, shape.channels, shape.taps - 1),
        "weight": (shape.channels, 1, shape.taps),
        "bias": (shape.channels,),
    }
    return {
        name: torch.randn(size, generator=generator, device=device).half().contiguous() for name, size in sizes.items()
    }


def scan_reference(inputs: Inputs) -> Result:
    """Compute h1::ssm_scan token by token in float64."""
    wide = {name: value.double() for name, value in inputs.items()}
    step = F.softplus(wide["dt"] + wide["dt_bias"]) * wide["mask"][..., None]
    repeat = wide["x"].shape[2] // wide["B"].shape[2]
    B, C = (wide[name].repeat_interleave(repeat, dim=2) for name in ("B", "C"))
    state = wide["state"]
    outputs = []
    for t in range(wide["x"].shape[1]):
        drive = (step[:, t, :, None] * wide["x"][:, t])[..., None] * B[:, t, :, None, :]
        state = state * torch.exp(step[:, t] * wide["A"])[..., None, None] + drive
        outputs.append((state * C[:, t, :, None, :]).sum(-1))
    return torch.stack(outputs, 1) + wide["x"] * wide["D"][:, None], state


def conv_reference(inputs: Inputs) -> Result:
    """Compute h1::causal_conv in float64."""
    wide = {name: value.double() for name, value in inputs.items()}
    past = torch.cat([wide["state"], wide["x"].transpose(1, 2)], dim=-1)
    y = F.silu(F.conv1d(past, wide["weight"], wide["bias"], groups=past.shape[1]))
    return y.transpose(1, 2), past[:, :, -wide["state"].shape[2] :]


def error(actual: Result, expected: Result) -> float:
    """Return the largest deviation of y and of the state, each relative to its largest expected value."""
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            return float("inf")
        deviation = (a.double() - e.double()).abs().max() / e.double().abs().max()
        worst = max(worst, float(deviation) if bool(deviation.isfinite()) else float("inf"))
    return worst


def own(op: str) -> Contender:
    """Return our own Triton kernels of "ssm_scan" or "causal_conv", with the state in place."""
    launch = getattr(import_module(f"h1export.plugins.{op}.launch"), op)
    limits = {"dt_min": 0.0, "dt_max": float("inf")} if op == "ssm_scan" else {}
    return Contender(
        "h1export",
        lambda inputs: inputs | {"state": inputs["state"].clone()},
        lambda ready: launch(**ready, **limits, new_state=ready["state"]),
        lambda answer, ready, inputs: answer,
    )


def own_kernels(inputs: Inputs, device: str) -> dict[str, Callable[[], Any]]:
    """Return a call of each kernel alone that our scan of many tokens launches, by name.

    The order of the launches fills the workspace, so every call has the values that it has within the scan.
    """
    launch = import_module("h1export.plugins.ssm_scan.launch")
    kernel = import_module("h1export.plugins.gpu.kernel")
    names = import_module("h1export.plugins.gpu.device")
    batch, tokens, heads, d_head = inputs["x"].shape
    groups, d_state = inputs["B"].shape[2:]
    problem = launch.Problem(
        batch,
        tokens,
        heads,
        groups=groups,
        d_head=d_head,
        d_state=d_state,
        dtype=kernel.DTYPES[inputs["x"].dtype],
        dt_min=0.0,
        dt_max=float("inf"),
        device_name=names.name(inputs["x"].device),
    )
    made = {name: torch.empty(size, dtype=dtype, device=device) for name, (size, dtype) in problem.workspace().items()}
    tensors = {**inputs, **made, "y": torch.empty_like(inputs["x"]), "new_state": torch.empty_like(inputs["state"])}
    calls = {}
    for each in launch.launches(problem):
        calls[each.kernel.name] = partial(kernel.run, (each,), tensors)
        calls[each.kernel.name]()
    return calls


def _mamba_update(inputs: Inputs) -> Inputs:
    heads, d_head = inputs["x"].shape[2:]
    spread = {name: inputs[name][:, None].expand(heads, d_head) for name in ("D", "dt_bias")}
    spread["A"] = inputs["A"][:, None, None].expand(heads, d_head, inputs["B"].shape[3])
    spread["dt"] = inputs["dt"][:, 0, :, None].expand(-1, heads, d_head)
    return spread | {name: inputs[name][:, 0] for name in ("x", "B", "C")} | {"state": inputs["state"].clone()}


def mamba_update() -> Contender:
    """Return mamba-ssm's selective_state_update, for one token; it writes the state in place."""
    update = import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
    return Contender(
        "mamba-ssm",
        _mamba_update,
        lambda ready: update(**ready, dt_softplus=True),
        lambda answer, ready, inputs: (answer[:, None], ready["state"]),
    )


def mamba_scan() -> Contender:
    """Return mamba-ssm's mamba_chunk_scan_combined."""
    scan = import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    names = ("x", "dt", "A", "B", "C", "D", "dt_bias")
    return Contender(
        "mamba-ssm",
        lambda inputs: {name: inputs[name] for name in names} | {"initial_states": inputs["state"]},
        lambda ready: scan(**ready, chunk_size=CHUNK, dt_softplus=True, return_final_states=True),
        lambda answer, ready, inputs: answer,
    )


def _gla_inputs(inputs: Inputs) -> Inputs:
    step = F.softplus(inputs["dt"].float() + inputs["dt_bias"])
    repeat = inputs["x"].shape[2] // inputs["B"].shape[2]
    return {
        "q": inputs["C"].repeat_interleave(repeat, dim=2),
        "k": inputs["B"].repeat_interleave(repeat, dim=2),
        "v": (inputs["x"].float() * step[..., None]).half(),
        "g": step * inputs["A"],
        "initial_state": inputs["state"].transpose(2, 3).contiguous(),
    }


def gla(one_token: bool) -> Contender:
    """Return flash-linear-attention's simple_gla: recurrent for one token, and in chunks for many."""
    module = import_module("fla.ops.simple_gla")
    run = module.fused_recurrent_simple_gla if one_token else module.chunk_simple_gla
    return Contender(
        "flash-linear-attention",
        _gla_inputs,
        lambda ready: run(**ready, scale=1.0, output_final_state=True),
        lambda answer, ready, inputs: (
            answer[0].float() + inputs["x"].float() * inputs["D"][:, None],
            answer[1].transpose(2, 3),
        ),
    )


def gla_conv() -> Contender:
    """Return flash-linear-attention's causal_conv1d; its state holds one input more than ours."""
    run = import_module("fla.modules.causal_conv1d").causal_conv1d
    return Contender(
        "flash-linear-attention",
        lambda inputs: {
            "x": inputs["x"],
            "weight": inputs["weight"][:, 0].contiguous(),
            "bias": inputs["bias"],
            "initial_state": F.pad(inputs["state"], (1, 0)),
        },
        lambda ready: run(**ready, activation="silu", output_final_state=True),
        lambda answer, ready, inputs: (answer[0], answer[1][..., 1:]),
    )


Makers = dict[str, Callable[[], Contender]]


def makers(op: str, one_token: bool) -> Makers:
    """Return name to maker of every contender of "ssm_scan" or "causal_conv"; a maker imports its implementation."""
    if op == "causal_conv":
        return {"h1export": lambda: own(op), "flash-linear-attention": gla_conv}
    return {
        "h1export": lambda: own(op),
        "mamba-ssm": mamba_update if one_token else mamba_scan,
        "flash-linear-attention": lambda: gla(one_token),
    }
