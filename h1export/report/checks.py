"""What a row of a report is about: the kind of check, what was compared with what, and the phase of inference."""

from __future__ import annotations

from enum import StrEnum


class CheckKind(StrEnum):
    """What was run. The values are those of report.json; labels.py has the texts that people read."""

    CASE = "case"
    """Calls that have broken exports before, on random tokens: logits and states. ``Row.case`` names the case."""

    CONTEXT = "context"
    """Logits and states after a prefill of ``Row.length`` tokens in chunks."""

    CONTEXT_COST = "context cost"
    """Milliseconds of a token in prefill and in decode, at a context of ``Row.length`` tokens."""

    BISECT = "bisect"
    """The first layer and op family beyond tolerance, in the calls of ``Row.phase``."""

    BISECT_INTEGERS = "bisect integers"
    """The stored tensor that is furthest from the checkpoint's."""

    STORED_INTEGERS = "stored integers"
    """The dequantised weights that the artifact stores, against the checkpoint's."""

    TEXT = "bits per byte"
    """Bits per byte of a text, and the KL divergence from the reference's predictions."""

    COST = "cost"
    """What the integers that ``Row.case`` names cost on a text: divergence, agreement, greedy length, and how sure."""

    GREEDY_TEXT = "greedy text"
    """Tokens of greedy generation before the first that the reference would not have chosen."""

    LATENCY = "latency"
    """The time of ``Row.phase``, relative to that of the reference where there is one."""

    SPEED = "speed"
    """Tokens a second in ``Row.phase``: a prompt of ``Row.length`` tokens, or decode after so many."""

    SHARED_INTEGERS = "shared integers"
    """How many tensors have the same integers as in other artifacts of the checkpoint."""

    FP16_RANGE = "fp16 range"
    """The largest activation, against the largest finite fp16 number."""

    PUBLISHED = "published"
    """Logits and tokens that somebody else computed from the same published weights."""

    LOADING = "loading"
    """Whether the runtime loads the artifact on ``Row.device``."""


class Comparison(StrEnum):
    """Which run is compared with which weights. The values of the first three begin the names of their tolerances."""

    SOURCE = "source"
    """The artifact as it ships, against PyTorch on the checkpoint's weights: shows quantisation and lowering."""

    STORED = "stored"
    """The artifact in float32 arithmetic, against PyTorch on the artifact's stored weights: shows lowering alone."""

    DRIFT = "drift"
    """The artifact as it ships, against PyTorch on the artifact's stored weights: shows rounded activations too."""

    FP16_LIMIT = "fp16 limit"
    """The activations of the artifact as it ships, against 65504, the largest finite fp16 number."""

    GOLDEN = "golden"
    """The package on one compute unit, against logits that were stored when it was built."""

    ALONE = "alone"
    """The artifact as it ships, against nothing: a figure that stands for itself, such as a time."""


class Phase(StrEnum):
    """The phase of inference: a prompt in one call, or tokens one by one."""

    PREFILL = "prefill"
    DECODE = "decode"
