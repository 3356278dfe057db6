"""Default limits: wide enough for rounding, narrow enough for every planted fault in tests/validate/accuracy/test_faults.py.

A metric is "group.figure". ``stored``: the artifact in float32 arithmetic against the model that holds the artifact's own
dequantised weights, so it shows lowering errors alone. ``drift``: the same for the artifact as it ships, where it rounds
activations. ``source``: the artifact as it ships against the checkpoint, so it shows quantisation too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from h1export.artifact.manifest import Manifest
from h1export.errors import H1ExportError
from h1export.quantize.scheme import PREQUANTIZED, Method, QuantName

# float32 against float32: 4 layers differ by 2e-6 of the range, 36 layers by 3e-6
EXACT: Mapping[str, float] = {"logits": 5e-5, "states": 5e-5, "kl": 1e-6, "top1": 0.99}
# activations rounded to int8 (accuracy level 4), or to fp16, which is far inside
ROUNDED: Mapping[str, float] = {"logits": 0.08, "states": 0.25, "kl": 0.05, "top1": 0.75}
# fp16 activations on fp16 weights: 4 layers differ by 5e-4 and 1.2e-3, and 36 layers add up to three times that
HALF: Mapping[str, float] = {"logits": 5e-3, "states": 1e-2, "kl": 1e-4, "top1": 0.9}
QUANTIZED: Mapping[QuantName, Mapping[str, float]] = {
    "int8": {"source.kl": 0.05, "text.ratio": 1.01},
    "int4": {"source.kl": 0.3, "text.ratio": 1.05},
}
STEPS = 0.51  # rounding to nearest leaves half a step, and rounding the scale to fp16 a little more
# other methods clip (search) and make up for errors elsewhere (GPTQ: up to 7 steps for a weight, 1.3 for a block); a wrong block is 3 off
BLOCK = 2.0
# ratios to PyTorch; prefill is mostly matrix products, where PyTorch is good and a busy machine makes the ratio swing
FP16 = {"fp16.share": 1.0}  # of 65504, the largest finite number: what lies beyond is infinite
LATENCY = {"latency.prefill": 1.5, "latency.decode": 1.0}


def limits_of(manifest: Manifest, float32: bool, exact: bool, *, chosen: Mapping[str, float]) -> dict[str, float]:
    """``limits`` for the artifact with this ``manifest``, by its shortest integers: single tensors may have others than its scheme."""
    bits = min((weight.bits for weight in manifest.weights), default=0)
    quant: QuantName = next((name for name in get_args(QuantName) if name == f"int{bits}"), "none")
    chosen_by = manifest.scheme.get("method", "rtn")
    # what a ready-made checkpoint has in floats is rounded, and what it has in integers must be equal
    method: Method = (
        "rtn" if chosen_by == PREQUANTIZED else next(name for name in get_args(Method) if name == chosen_by)
    )
    return limits(quant, method, float32, exact=exact, chosen=chosen)


def limits(
    quant: QuantName, method: Method, float32: bool, exact: bool, chosen: Mapping[str, float]
) -> dict[str, float]:
    """Metric -> limit for artifacts of ``quant`` by ``method``; ``chosen`` overrides.

    ``float32``: they ship with float32 activations. ``exact``: their lowering is judged in float32 arithmetic.

    Raises:
        H1ExportError: ``chosen`` names a metric that this artifact has no gate for.
    """
    group = "source" if quant == "none" else "stored"
    rounded = not exact or (
        quant == "none" and not float32
    )  # weights are rounded with the activations, so nothing is exact
    table = {f"{group}.{figure}": limit for figure, limit in (HALF if rounded else EXACT).items()} | LATENCY | FP16
    if not float32 and not rounded:
        table |= {f"drift.{figure}": limit for figure, limit in ROUNDED.items()}
    integers = {"weights.steps": STEPS} if method == "rtn" else {"weights.block": BLOCK}
    table |= {"text.ratio": 1.001 if rounded else 1.0001} if quant == "none" else {**integers, **QUANTIZED[quant]}
    known = table.keys() | {f"source.{figure}" for figure in EXACT}
    for metric in chosen:
        if metric not in known:
            raise H1ExportError(
                "--limit", f"{metric!r} is no gate of this artifact", f"one of {', '.join(sorted(known))}"
            )
    return table | dict(chosen)
