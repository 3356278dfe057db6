"""The reference: transformers' FalconH1ForCausalLM in float32, run on whole sequences, one row at a time.

It runs full forwards, and long rows in chunks of many tokens. transformers' cached decode ignores time_step_limit and
its padded batches leak into the convolution (both in 5.23). The truth of a padded row is therefore the row run alone,
and that of a decode step the forward of all tokens so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from h1export.checkpoint.packed_formats import load_format
from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.transformers_config import plain_config
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array, Ids, StateKind
from h1export.model.falcon_h1.tensors import tensor_shapes
from h1export.runtime.runner import Limits, Provenance, Session
from h1export.validate.accuracy.logits import relative_error
from h1export.validate.accuracy.reference_probes import arrays, watched

# tokens of a long row at a time; a single last token joins the chunk before it, because alone it would be a decode step
CHUNK = 512
# relative error of chunks against the whole row; where transformers does not read the cache, it is far larger
CHUNK_TOLERANCE = 1e-3


class Reference:
    """transformers' model on the checkpoint's weights, dequantised where they are integers; ``hold`` replaces them."""

    def __init__(self, checkpoint: Path, adapters: Sequence[Path] = ()) -> None:
        from transformers import FalconH1ForCausalLM
        from transformers.utils import logging

        model_class: Any = FalconH1ForCausalLM  # untyped
        log: Any = logging
        log.set_verbosity_error()
        log.disable_progress_bar()
        self.config = FalconH1Config.load(checkpoint)
        packed = load_format(checkpoint) is not None
        config = plain_config(checkpoint)
        try:
            if packed:  # transformers itself would need kernels for GPTQ
                self._model: Any = model_class(config).float().eval()
            else:
                plain = {"config": config, "use_safetensors": True, "local_files_only": True}
                self._model = model_class.from_pretrained(checkpoint, dtype=torch.float32, **plain).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise H1ExportError(
                checkpoint, f"transformers cannot load it ({error})", "compare it with the published checkpoint"
            ) from None
        if packed or adapters:
            model_config = FalconH1Config.load(checkpoint)
            store = WeightStore.open(checkpoint, model_config, adapters=adapters)
            for name, shape in tensor_shapes(model_config).items():
                self.hold({name: store.rows(name, 0, shape[0])})

    def hold(self, weights: Mapping[str, Array]) -> None:
        """Replace parameters, in place, by ``weights``: checkpoint name -> float32 tensor."""
        parameters = dict(self._model.named_parameters())
        with torch.no_grad():
            for name in weights:
                parameters[name].copy_(torch.from_numpy(weights[name]))

    def observe(self, ids: Ids) -> tuple[Array, dict[str, Array], dict[str, Array]]:
        """Return what ``full`` does, and the probes of model/falcon_h1/probes.py: name -> float32 [seq, width]."""
        with watched(self._model) as found:
            logits, states = self.full(ids)
        return logits, states, arrays(found)

    def full(self, ids: Ids) -> tuple[Array, dict[str, Array]]:
        """Return the logits [seq, vocab] and states of one unpadded row [seq].

        The states are canonical, by StateTensor.key, without the batch axis.
        """
        return self._forward(ids, None, 0)[:2]

    def in_chunks(self, ids: Ids, tail: int, chunk: int = CHUNK) -> tuple[Array, dict[str, Array]]:
        """Return what ``full`` does for the last ``tail`` positions, in memory that grows with the states alone.

        Raises:
            H1ExportError: this transformers does not continue correctly from a cache by several tokens.
        """
        if chunk == CHUNK:
            self._check_chunks()
        cache = None
        start = 0
        kept = np.zeros((0, self._model.config.vocab_size), np.float32)
        while start < len(ids):
            end = len(ids) if len(ids) - start <= chunk + 1 else start + chunk
            logits, states, cache = self._forward(ids[start:end], cache, tail)
            start = end
            kept = np.concatenate([kept, logits])[-tail:]
        return kept, states

    def _check_chunks(self) -> None:
        ids = np.arange(24) % self._model.config.vocab_size
        if not relative_error(self.in_chunks(ids, len(ids), chunk=16)[0], self.full(ids)[0]) <= CHUNK_TOLERANCE:
            what = "its Falcon-H1 does not continue a cache by several tokens, so long contexts have no reference"
            raise H1ExportError("transformers", what, "install 5.24 or a later one, or leave out --context")

    def _forward(self, ids: Ids, cache: Any, tail: int) -> tuple[Array, dict[str, Array], Any]:
        """Run ids [seq] after those in ``cache``; return the last ``tail`` logits (0: all), states and cache."""
        past = {} if cache is None else {"past_key_values": cache}
        with torch.no_grad():
            result = self._model(torch.from_numpy(ids)[None], **past, use_cache=True, logits_to_keep=tail)
        states: dict[str, Array] = {}
        for index, layer in enumerate(result.past_key_values.layers):
            found = {
                StateKind.KEY: layer.keys,
                StateKind.VALUE: layer.values,
                StateKind.CONV: layer.conv_states[0][
                    ..., 1:
                ],  # transformers keeps one input more than the convolution needs
                StateKind.RECURRENT: layer.recurrent_states[0],
            }
            states |= {f"{index}.{kind}": np.asarray(tensor[0].float().numpy()) for kind, tensor in found.items()}
        logits: Array = result.logits[0].numpy()
        return logits, states, result.past_key_values

    @property
    def limits(self) -> Limits:
        return Limits(all_logits=False)

    @property
    def provenance(self) -> Provenance:
        return Provenance(kernels=f"PyTorch {torch.__version__}, transformers {metadata.version('transformers')}")

    def start(self, batch: int, capacity: int) -> Session:
        """Start ``batch`` sequences for timing; their cache takes any number of tokens."""
        return CachedSession(self._model)


class CachedSession:
    """transformers' cached decode, for timing alone, because it has the errors that the module's docstring names."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = None
        self.length = 0

    def append(self, ids: Ids, *, keep: int | None = None) -> Array:
        with torch.no_grad():
            result = self._model(torch.from_numpy(ids), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = result.past_key_values
        self.length += ids.shape[1]
        logits: Array = result.logits.numpy()
        return logits
