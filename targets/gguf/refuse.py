"""Models that llama.cpp cannot run, or computes wrongly without a word: each is refused by name.

llama.cpp's graph of this family (src/models/falcon-h1.cpp and build_mamba2_layer) has one gated norm, after the gate,
no limit on the time step, and adds no bias after the projections of attention and of the mixer. It does not read the
keys of the config that say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from pathlib import Path

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config

OTHERS = "build for another target, such as --target ort"

# key of config.json -> (whether llama.cpp cannot take the model, what it would do)
REFUSED: Mapping[str, tuple[Callable[[FalconH1Config], bool], str]] = {
    "mamba_norm_before_gate": (
        lambda config: config.mamba_rms_norm and config.mamba_norm_before_gate,
        "is true, and llama.cpp always gates before it normalises",
    ),
    "time_step_limit": (
        lambda config: config.time_step_limit != (0.0, inf),
        "limits the time step, and llama.cpp would not",
    ),
    "attention_bias": (
        lambda config: config.attention_bias,
        "is true, and llama.cpp leaves biases of attention out",
    ),
    "mamba_proj_bias": (
        lambda config: config.mamba_proj_bias,
        "is true, and llama.cpp has no tensor for the bias of in_proj",
    ),
    "projectors_bias": (
        lambda config: config.projectors_bias,
        "is true, and llama.cpp has no tensor for the bias of out_proj",
    ),
}


def check_model(config: FalconH1Config, where: str | Path = "config.json") -> None:
    """Refuse a model that llama.cpp would not compute as it is.

    Raises:
        H1ExportError: it is one of them; the error names the key of config.json.
    """
    for key, (holds, what) in REFUSED.items():
        if holds(config):
            raise H1ExportError(f"{where}: {key}", what, OTHERS)
