"""Refuse the models that mlx-lm computes wrongly, or cannot load, before any work.

Source: ``mlx_lm/models/falcon_h1.py`` and ``ssm.py`` of the release ``sdk.FOLDED_FOR``.
"""

from __future__ import annotations

import math

from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.quantize.source import QuantizedWeights
from h1export.targets.mlx.options import MlxOptions

OTHER = "use another --target"
SIMD = 32  # states of a head that a Metal thread group divides among its threads


def check(config: FalconH1Config, store: WeightStore, integers: QuantizedWeights, *, options: MlxOptions) -> None:
    """Check that mlx-lm computes this model as transformers does.

    Raises:
        H1ExportError: it does not.
    """
    _check_config(config)
    for name in integers.precisions:
        if store.order_name(name):
            what = "has its columns in the order of act-order, and mlx-lm gathers no inputs"
            raise H1ExportError(f'tensor "{name}"', what, "use --target ort or --target gptq")
    if store.packed and options.compute != "fp32":
        what = f"{options.compute} would round the scales of a prequantized checkpoint, into which µP is folded"
        raise H1ExportError("--compute", what, "use --compute fp32, or give the unquantised checkpoint")


def _check_config(config: FalconH1Config) -> None:
    if config.mamba_rms_norm and config.mamba_n_groups > 1:
        what = (
            f"mamba_rms_norm with mamba_n_groups {config.mamba_n_groups}: mlx-lm's norm takes all channels as one group"
        )
        raise H1ExportError("config.json", what, OTHER)
    if config.time_step_limit != (0.0, math.inf):
        low, high = config.time_step_limit
        what = f"time_step_limit [{low:g}, {high:g}]: mlx-lm bounds no time step"
        raise H1ExportError("config.json", what, OTHER)
    if config.mamba_d_state % SIMD:
        what = f"mamba_d_state {config.mamba_d_state}: mlx-lm's Metal kernel drops what {SIMD} does not divide"
        raise H1ExportError("config.json", what, OTHER)
