"""Inputs and outputs of a model in a Hugging Face folder, for the manifest: the client keeps the states itself."""

from __future__ import annotations

from collections.abc import Mapping

from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import BATCH, INPUT_IDS, LOGITS, SEQUENCE

Ports = Mapping[str, tuple[str, tuple[int | str, ...]]]

INPUTS: Ports = {INPUT_IDS: ("INT64", (BATCH, SEQUENCE))}


def outputs(config: FalconH1Config, last_logits: bool) -> Ports:
    """Return the outputs of a call; with ``last_logits`` only the last position has logits."""
    return {LOGITS: ("FLOAT", (BATCH, 1 if last_logits else SEQUENCE, config.vocab_size))}
