"""transformers as a peer: FalconH1ForCausalLM in eager PyTorch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from h1export.report.checks import Phase
from h1export.runtime.runner import Limits, Provenance
from h1export.validate.speed.worker import Timing

START = 8  # tokens that a cache is started with


class Eager:
    """transformers' model as a Model of validate/speed/worker.py.

    A past is not computed but made: random keys and values, as time does not depend on them and transformers'
    chunked prefill would take most of the benchmark.
    """

    def __init__(self, checkpoint: Path, dtype: str, threads: int, *, steps: int) -> None:
        from transformers import FalconH1ForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._model: Any = FalconH1ForCausalLM.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype), local_files_only=True
        ).eval()
        self._steps = steps
        self.limits = Limits(all_logits=False)
        self.provenance = Provenance(kernels=f"PyTorch {torch.__version__}, {dtype}")

    def speed(self, timing: Timing) -> float:
        """Tokens per second."""
        if timing.phase is Phase.PREFILL:
            return timing.tokens / self._timed(None, [timing.tokens])
        cache = self._call(None, START)
        for layer in cache.layers if timing.tokens > START else ():
            batch, heads, _, dim = layer.keys.shape
            layer.keys, layer.values = (
                torch.randn(batch, heads, timing.tokens, dim, dtype=layer.keys.dtype) for _ in range(2)
            )
        return self._steps / self._timed(cache, [1] * self._steps)

    def _timed(self, cache: Any, calls: list[int]) -> float:
        start = time.perf_counter()
        for tokens in calls:
            cache = self._call(cache, tokens)
        return time.perf_counter() - start

    def _call(self, cache: Any, tokens: int) -> Any:
        ids = torch.randint(0, self._model.config.vocab_size, (1, tokens))
        with torch.no_grad():
            return self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
