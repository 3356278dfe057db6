"""The reference's side of the probes: hooks on transformers' modules, in one forward of the whole row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from h1export.model.falcon_h1.probes import ProbePoint, probe_name
from h1export.model.falcon_h1.projections import POINTS_READ
from h1export.model.falcon_h1.states import Array

Found = dict[str, Tensor]


@contextmanager
def watched(model: Any) -> Iterator[Found]:
    """Record the probes [1, seq, width] of every forward of FalconH1ForCausalLM ``model`` while the context is open."""
    found: Found = {}
    handles = []

    def before(module: Any, name: str) -> None:
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs: _keep(found, name, _first(args, kwargs)), with_kwargs=True
            )
        )

    def after(module: Any, keep: Callable[[Tensor], None]) -> None:
        handles.append(module.register_forward_hook(lambda _module, _args, result: keep(result)))

    def after_scaled(module: Any, name: str, factor: float = 1.0) -> None:
        after(module, lambda result: _keep(found, name, result * factor))

    for index, layer in enumerate(model.model.layers):
        for module, point in POINTS_READ.items():
            before(layer.get_submodule(module), probe_name(index, point))
        after(layer.mamba.in_proj, partial(_keep_projected, found, index, layer.mamba))
        after_scaled(layer.self_attn.q_proj, probe_name(index, ProbePoint.QUERY))
        after_scaled(layer.self_attn.k_proj, probe_name(index, ProbePoint.KEY), layer.self_attn.key_multiplier)
        after_scaled(layer.self_attn.v_proj, probe_name(index, ProbePoint.VALUE))
    before(model.model.final_layernorm, probe_name(len(model.model.layers), ProbePoint.RESIDUAL))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    value = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(value, Tensor)
    return value


def _keep(found: Found, name: str, value: Tensor) -> None:
    found[name] = value.detach().float()


def _keep_projected(found: Found, layer: int, mixer: Any, projected: Tensor) -> None:  # noqa: PLR0917  a hook
    """Record in_proj's output, µP included, in its parts, and the convolution of one part, which no module returns."""
    sizes = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
    gate, xbc, dt = (projected * mixer.mup_vector).split(sizes, dim=-1)
    conv = torch.nn.functional.conv1d(
        xbc.transpose(1, 2),
        mixer.conv1d.weight,
        mixer.conv1d.bias,
        padding=mixer.conv_kernel_size - 1,
        groups=mixer.conv_dim,
    )
    activated = torch.nn.functional.silu(conv[..., : xbc.shape[1]]).transpose(1, 2)
    for point, value in (
        (ProbePoint.GATE, gate),
        (ProbePoint.CONV_INPUT, xbc),
        (ProbePoint.DT, dt),
        (ProbePoint.CONV, activated),
    ):
        _keep(found, probe_name(layer, point), value)


def arrays(found: Found) -> dict[str, Array]:
    """Return the probes as NumPy arrays [seq, width]."""
    return {name: value[0].numpy() for name, value in found.items()}
