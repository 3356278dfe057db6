"""An artifact as a model of transformers: ``h1export.hf.load(OUT)`` works with ``.generate``, streamers and pipelines.

Greedy, sampling and beam search work, padded batches too. Refused, with an error: assisted generation and prompt lookup (states
cannot go back), a cache of the caller's, ``inputs_embeds``, hidden states and attentions, training.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import FalconH1Config, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils.generic import ModelOutput

from h1export.artifact.artifact import Artifact
from h1export.commands import pipeline
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.special_tokens import GENERATION_CONFIG
from h1export.model.falcon_h1.states import Ids
from h1export.runtime.runner import Runner
from h1export.runtime.session import BatchSession, RowByRowSession, open_session
from h1export.targets import Kernels

STATE = "state"  # the name under which `generate` carries what is no KV cache, in every transformers 5


def load(out: str | Path, threads: int = 0, kernels: Kernels = "auto") -> FalconH1ForCausalLM:
    """The artifact in the folder ``out``. The arguments are those of ``h1export.load``.

    Raises:
        H1ExportError: a damaged artifact, or one that does not run here.
    """
    artifact = Artifact.open(Path(out))
    config: Any = FalconH1Config
    model = FalconH1ForCausalLM(
        config.from_pretrained(artifact.folder, local_files_only=True), pipeline.load(artifact, threads, False, kernels)
    )
    if (artifact.folder / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(artifact.folder), local_files_only=True)
    return model


@dataclass
class Logits(ModelOutput):
    """logits: float32 [batch, positions, vocab]."""

    logits: torch.Tensor | None = None


class State:
    """The session that `generate` carries from step to step."""

    def __init__(self, session: BatchSession) -> None:
        self.session = session

    def reorder_cache(self, beams: torch.Tensor) -> None:
        """Let row i go on from where row ``beams[i]`` is. Raises H1ExportError for rows that cannot change places."""
        if not isinstance(self.session, RowByRowSession):
            raise H1ExportError("reorder", "the rows of this session cannot change places", "open a movable one")
        self.session.reorder(beams.tolist())


class FalconH1ForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """transformers' interface over a Runner; it has no parameters. Pipelines know a model by the name of its class."""

    config_class = FalconH1Config
    main_input_name = "input_ids"
    _is_stateful = True  # transformers refuses what would have to take tokens back

    def __init__(self, config: Any, runner: Runner[Any]) -> None:
        super().__init__(config)
        self.runner = runner

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        state: State | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
    ) -> Any:
        """Logits after input_ids int64 [batch, new], on their device.

        Args:
            input_ids: token ids.
            attention_mask: [batch, past + new], 1 for real tokens, left padding only; None: no pads.
            state: of the call before, updated in place; None: none, so past is 0.
            logits_to_keep: only those of so many last positions; 0: of all.
            return_dict: False: a tuple.

        Raises:
            H1ExportError: what ``Runner.step`` refuses.
        """
        ids: Ids = input_ids.cpu().numpy().astype(np.int64, copy=False)
        past = 0 if state is None else state.session.length
        shape = (len(ids), past + ids.shape[1])
        mask: Ids = (
            np.ones(shape, np.int64) if attention_mask is None else attention_mask.cpu().numpy().astype(np.int64)
        )
        session = open_session(self.runner, *shape, padded=not mask.all()) if state is None else state.session
        logits = torch.from_numpy(session.append(ids, mask, logits_to_keep or ids.shape[1])).to(input_ids.device)
        return Logits(logits=logits) if return_dict else (logits,)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        state: State | None = None,
        *,
        logits_to_keep: int = 0,
        **kwargs: Any,  # what `generate` tells models that keep their states otherwise
    ) -> dict[str, Any]:
        """The arguments of ``forward``: the tokens that ``state`` has not seen."""
        new = input_ids[:, 0 if state is None else state.session.length :]
        return {"input_ids": new, "attention_mask": attention_mask, STATE: state, "logits_to_keep": logits_to_keep}

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: MutableMapping[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        """Where `generate` makes its cache: the state that suits the batch, or an error for what a Runner has not."""
        for name in ("output_hidden_states", "output_attentions", "cache_implementation", "prefill_chunk_size"):
            if getattr(generation_config, name, None):
                raise H1ExportError("generate", f"{name} is not to be had from an exported model", "leave it out")
        if model_kwargs.get(STATE) is not None:
            raise H1ExportError("generate", f"{STATE} of another call", "give the whole text as input_ids")
        if generation_config.use_cache:
            beams = generation_config.num_beams or 1
            rows = batch_size * max(beams, generation_config.num_return_sequences or 1)
            padded = model_kwargs.get("attention_mask") is not None
            model_kwargs[STATE] = State(
                open_session(self.runner, rows, max_cache_length, padded=padded, movable=beams > 1)
            )
        return False  # it is declared so, and nothing reads it

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise H1ExportError("save_pretrained", "the weights lie in the artifact", "copy its folder")
