"""The judge: transformers' FalconH1ForCausalLM in float32, run on whole sequences, one row at a time.

Full forwards only. transformers' cached decode ignores time_step_limit and its padded batches leak into the convolution
(both in 5.23), so for a padded row the truth is the row run alone, and for a decode step it is the forward of all so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from h1export.core.protocols import Ids
from h1export.core.spec import HybridSpec
from h1export.core.state import Array, StateKind
from h1export.core.weights import WeightStore, tensor_layout
from h1export.core.weights.gptq_layout import GptqLayout
from h1export.errors import H1ExportError
from h1export.validate.probes import arrays, watched


class Reference:
    """The published model on the checkpoint's weights, or on an artifact's; on integers times scales where the checkpoint has those."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import FalconH1Config, FalconH1ForCausalLM
        from transformers.utils import logging

        model_class: Any = FalconH1ForCausalLM  # untyped
        config_class: Any = FalconH1Config
        log: Any = logging
        log.set_verbosity_error()
        log.disable_progress_bar()
        packed = GptqLayout.load(checkpoint) is not None
        try:
            if packed:  # transformers itself would need kernels for it
                config = config_class.from_pretrained(checkpoint, local_files_only=True)
                del config.quantization_config
                self._model: Any = model_class(config).float().eval()
            else:
                self._model = model_class.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise H1ExportError(checkpoint, f"transformers cannot load it ({error})", "compare it with the published checkpoint") from None
        if packed:
            spec = HybridSpec.load(checkpoint)
            store = WeightStore.open(checkpoint, spec)
            for name, shape in tensor_layout(spec).items():
                self.hold({name: store.rows(name, 0, shape[0])})

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

    def start(self, ids: Ids) -> Any:
        """Prefill a row [seq] for timing; returns the cache."""
        with torch.no_grad():
            return self._model(torch.from_numpy(ids)[None], use_cache=True, logits_to_keep=1).past_key_values

    def decode(self, token: int, cache: Any) -> None:
        """One cached step for timing."""
        with torch.no_grad():
            self._model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
