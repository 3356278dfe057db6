"""Default tolerances of `validate`.

They are wide enough for rounding, and narrow enough for every planted fault in tests/validate/accuracy/test_faults.py.
A metric is "PREFIX.FIGURE". The prefix of logits and states is the comparison (see report/checks.py); the other
prefixes are ``weights`` (stored integers), ``text``, ``latency`` and ``fp16``. The performance gates of `h1export gate`
are another thing: see docs/gates.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from h1export.artifact.manifest import Manifest
from h1export.artifact.state_bytes import ROWS
from h1export.errors import H1ExportError
from h1export.quantize.choices import Method, QuantName, parse_method
from h1export.quantize.precision import Precision
from h1export.quantize.scheme import PREQUANTIZED
from h1export.report.checks import Comparison, Phase

# float32 against float32: 4 layers differ by 2e-6 of the range, 36 layers by 3e-6
EXACT: Mapping[str, float] = {"logits": 5e-5, "states": 5e-5, "kl": 1e-6, "top1": 0.99}
# activations rounded to int8 (accuracy level 4), or to fp16, which is far inside
ROUNDED: Mapping[str, float] = {"logits": 0.08, "states": 0.25, "kl": 0.05, "top1": 0.75}
# fp16 activations on fp16 weights: 4 layers differ by 5e-4 and 1.2e-3, and 36 layers add up to three times that
HALF: Mapping[str, float] = {"logits": 5e-3, "states": 1e-2, "kl": 1e-4, "top1": 0.9}
# bf16 activations, which are rounded 8 times as far: 8 times HALF, but for KL, which grows with the square
BRAIN: Mapping[str, float] = {"logits": 4e-2, "states": 8e-2, "kl": 6e-3, "top1": 0.85}
# Keys and values rounded to int8 beside activations in float32: the embedded model's 4 layers differ by 2.5e-3 and
# 4.6e-3, and the farthest of random ones by 7.4e-3 and 8.3e-3 (KL up to 1.3e-5)
CODES: Mapping[str, float] = {"logits": 3e-2, "states": 3e-2, "kl": 5e-4, "top1": 0.85}
STEPS_METRIC = "weights.steps"
GROUP_METRIC = "weights.group"
TEXT_METRIC = "text.ratio"
FP16_METRIC = "fp16.share"
QUANTIZED: Mapping[QuantName, Mapping[str, float]] = {
    "int8": {f"{Comparison.SOURCE}.kl": 0.05, TEXT_METRIC: 1.01},
    "int4": {f"{Comparison.SOURCE}.kl": 0.3, TEXT_METRIC: 1.05},
}
STEPS = 0.51  # rounding to nearest leaves half a step, and rounding the scale to fp16 a little more
# Other methods clip (search) or compensate for errors elsewhere (GPTQ: up to 7 steps for a weight, 1.3 for a group, and
# 2.2 after a calibration text of a few sequences, on some CPUs); a wrong group is off by 3.
GROUP = 2.5
FP16 = {FP16_METRIC: 1.0}  # of 65504, the largest finite number: what is beyond it is infinite
# Ratios to PyTorch. Prefill is mostly matrix products, at which PyTorch is fast and whose ratio varies on a busy
# machine.
LATENCY_PREFIX = "latency"
LATENCY = {f"{LATENCY_PREFIX}.{Phase.PREFILL}": 1.5, f"{LATENCY_PREFIX}.{Phase.DECODE}": 1.0}


def tolerances_of(
    manifest: Manifest, float32: bool, exact: bool, *, scale_rounding: float = 0.0, chosen: Mapping[str, float]
) -> dict[str, float]:
    """Return ``tolerances_for`` the artifact with this ``manifest``, with the same other arguments.

    The artifact's shortest integers decide, because single tensors may have other precisions than its scheme. A scale
    that is rounded by ``scale_rounding`` (see ``Provenance``) moves the largest code by that share of itself, in steps
    of its longest integers.

    An artifact whose options name bf16 has the tolerances BRAIN where others have HALF. bf16 has 8 bits of precision
    and fp16 has 11, so that a rounding is 8 times as large, on a GPU as here: a GPU adds up products in float32, and
    rounds where the CPU's stand-in does. That stand-in for the CUDA graph, which rounds every activation to bf16, is up
    to 8e-3 (logits), 1.2e-2 (states) and 1.1e-4 (KL) from the reference on 4 layers, and 36 layers add up to three
    times that (tests/targets/onnxruntime/test_cuda_bf16.py). No GPU has run it.
    """
    bits = min((weight.bits for weight in manifest.weights), default=0)
    quant: QuantName = next((name for name in get_args(QuantName) if name == f"int{bits}"), "none")
    chosen_by = manifest.scheme.get("method", "rtn")
    # floats of a prequantized checkpoint are rounded to nearest, and its integers must be equal
    method: Method = "rtn" if chosen_by == PREQUANTIZED else parse_method(str(chosen_by))[0]
    brain = "bf16" in manifest.options.values()
    codes = any(dtype == ROWS for dtype, _ in manifest.inputs.values())
    rounds = manifest.options.get("accuracy_level") != 0 or not codes
    longest = max((weight.bits for weight in manifest.weights), default=0)
    moved = Precision(longest, 0).top * scale_rounding if longest else 0.0
    return tolerances_for(
        quant, method, float32, exact=exact, brain=brain, codes=codes, rounds=rounds, moved=moved, chosen=chosen
    )


def tolerances_for(
    quant: QuantName,
    method: Method,
    float32: bool,
    *,
    exact: bool,
    brain: bool = False,
    codes: bool = False,
    rounds: bool = True,
    moved: float = 0.0,
    chosen: Mapping[str, float],
) -> dict[str, float]:
    """Return metric -> tolerance for artifacts of ``quant`` by ``method``; ``chosen`` overrides the defaults.

    Args:
        quant: the precision of the shortest integers.
        method: the method that chose the integers.
        float32: whether the artifact ships with float32 activations.
        exact: whether its lowering is judged in float32 arithmetic.
        brain: whether activations are bf16.
        codes: whether keys and values are stored in int8.
        rounds: whether activations may be rounded to int8 for products.
        moved: the steps by which the rounding of scales that contain µP moves a weight.
        chosen: metric -> tolerance, for --tolerance.

    Raises:
        H1ExportError: ``chosen`` names a metric that this artifact has no tolerance for.
    """
    lowering = Comparison.SOURCE if quant == "none" else Comparison.STORED
    # floats are stored in the precision of the activations, so without quantisation rounded activations mean rounded
    # weights
    rounded = not exact or (quant == "none" and not float32)
    values = EXACT if not rounded else BRAIN if brain else CODES if codes else HALF
    table = {f"{lowering}.{figure}": value for figure, value in values.items()} | LATENCY | FP16
    if not float32 and not rounded:
        table |= {f"{Comparison.DRIFT}.{figure}": value for figure, value in (ROUNDED if rounds else CODES).items()}
    if quant == "none":
        table |= {TEXT_METRIC: 1.001 if rounded else 1.0001}
    else:
        table |= {STEPS_METRIC: STEPS + moved} if method == "rtn" else {GROUP_METRIC: GROUP}
        table |= QUANTIZED[quant]
    known = table.keys() | {f"{Comparison.SOURCE}.{figure}" for figure in EXACT}
    for metric in chosen:
        if metric not in known:
            raise H1ExportError(
                "--tolerance", f"{metric!r} is no metric of this artifact", f"one of {', '.join(sorted(known))}"
            )
    return table | dict(chosen)
