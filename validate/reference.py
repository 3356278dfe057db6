"""The judge: transformers' FalconH1ForCausalLM in float32, run on whole sequences, one row at a time.

Full forwards only. transformers' cached decode ignores time_step_limit and its padded batches leak into the convolution
(both in 5.23), so for a padded row the truth is the row run alone, and for a decode step it is the forward of all so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from h1export.core.protocols import Capabilities, Ids, Sequences
from h1export.core.spec import HybridSpec
from h1export.core.state import Array, StateKind
from h1export.errors import H1ExportError
from h1export.validate.probes import arrays, watched


class Reference:
    """The published model on the checkpoint's weights, or on an artifact's."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import FalconH1ForCausalLM
        from transformers.utils import logging

        model_class: Any = FalconH1ForCausalLM  # untyped
        log: Any = logging
        log.set_verbosity_error()
        log.disable_progress_bar()
        self.spec = HybridSpec.load(checkpoint)
        try:
            self._model: Any = model_class.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise H1ExportError(checkpoint, f"transformers cannot load it ({error})", "compare it with the published checkpoint") from None

    def hold(self, weights: Mapping[str, Array]) -> None:
        """Replace parameters by ``weights``, in place."""
        parameters = dict(self._model.named_parameters())
        with torch.no_grad():
            for name in weights:
                parameters[name].copy_(torch.from_numpy(weights[name]))

    def observe(self, ids: Ids) -> tuple[Array, dict[str, Array], dict[str, Array]]:
        """``full``, and the probes of core/probes.py: name -> float32 [seq, width]."""
        with watched(self._model) as found:
            logits, states = self.full(ids)
        return logits, states, arrays(found)

    def full(self, ids: Ids) -> tuple[Array, dict[str, Array]]:
        """Logits [seq, vocab] of one unpadded row [seq] and, by StateTensor.key, its canonical states without the batch axis."""
        with torch.no_grad():
            result = self._model(torch.from_numpy(ids)[None], use_cache=True, logits_to_keep=0)
        states: dict[str, Array] = {}
        for index, layer in enumerate(result.past_key_values.layers):
            found = {
                StateKind.KEY: layer.keys,
                StateKind.VALUE: layer.values,
                StateKind.CONV: layer.conv_states[0][..., 1:],  # it keeps one input more than the convolution needs
                StateKind.RECURRENT: layer.recurrent_states[0],
            }
            states |= {f"{index}.{kind}": np.asarray(tensor[0].float().numpy()) for kind, tensor in found.items()}
        logits: Array = result.logits[0].numpy()
        return logits, states

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(None, all_logits=False, kernels=f"PyTorch {torch.__version__}, transformers {metadata.version('transformers')}")

    def start(self, batch: int, capacity: int) -> Sequences:
        """``batch`` sequences for timing; their cache takes any number of tokens."""
        return CachedSequences(self._model)


class CachedSequences:
    """transformers' cached decode, as its users run it. For timing: see above for what it gets wrong."""

    def __init__(self, model: Any) -> None:
        self._model, self._cache, self.length = model, None, 0

    def append(self, ids: Ids) -> Array:
        with torch.no_grad():
            result = self._model(torch.from_numpy(ids), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = result.past_key_values
        self.length += ids.shape[1]
        logits: Array = result.logits.numpy()
        return logits
