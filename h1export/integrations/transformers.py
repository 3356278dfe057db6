"""An artifact as a model of transformers: ``h1export.hf.load(OUT)`` works with ``.generate``, streamers and pipelines.

Greedy decoding, sampling, beam search and padded batches work. Assisted generation and prompt lookup are refused with
an error, because states cannot go back; so are a caller's own cache, ``inputs_embeds``, hidden states, attentions and
training.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import FalconH1Config, GenerationMixin, PreTrainedModel
from transformers.utils.generic import ModelOutput

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.transformers_config import plain_config, plain_generation_config
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Ids
from h1export.runtime.runner import Runner
from h1export.runtime.session import BatchSession, RowByRowSession, open_session
from h1export.targets import Kernels

STATE = "state"  # the argument in which `generate` of every transformers 5 carries states that are no KV cache


def load(out: str | Path, threads: int = 0, kernels: Kernels = "auto") -> FalconH1ForCausalLM:
    """Load the artifact in the folder ``out``. The arguments are those of ``h1export.load``.

    Raises:
        H1ExportError: The artifact is damaged, or does not run here.
    """
    artifact = Artifact.open(Path(out))
    config = plain_config(artifact.folder)
    generation = plain_generation_config(artifact.folder)
    model = FalconH1ForCausalLM(config, load_runner(artifact, threads, kernels=kernels))
    if generation is not None:
        model.generation_config = generation
    return model


@dataclass
class Logits(ModelOutput):
    """The output of a call: ``logits``, float32 [batch, positions, vocab]."""

    logits: torch.Tensor | None = None


class State:
    """The session that `generate` carries from step to step, for one call at a time."""

    def __init__(self, session: BatchSession) -> None:
        self.session = session

    def reorder_cache(self, beams: torch.Tensor) -> None:
        """Let row i go on from where row ``beams[i]`` is. Raises H1ExportError for rows that cannot change places."""
        if not isinstance(self.session, RowByRowSession):
            raise H1ExportError("reorder", "the rows of this session cannot change places", "open a movable one")
        self.session.reorder(beams.tolist())


class FalconH1ForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """The interface of transformers over a Runner.

    It has no parameters. Pipelines recognise a model by the name of its class. Threads may share it: each call of
    ``generate`` or ``forward`` has a session of its own, unless two are given the same ``state``, which raises.
    """

    config_class = FalconH1Config
    main_input_name = "input_ids"
    _is_stateful = True  # transformers then refuses what would have to remove tokens

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
        """Return the logits of input_ids int64 [batch, new], on their device.

        Args:
            input_ids: The new token ids.
            attention_mask: [batch, past + new], 1 for real tokens, left padding only; None means that there are no
                pads.
            state: The state of the call before, which is updated in place; None means that past is 0.
            logits_to_keep: The number of last positions whose logits are returned; 0 means all.
            return_dict: Whether the result is a ModelOutput; otherwise it is a tuple.

        Raises:
            H1ExportError: ``Runner.step`` refuses the call.
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
        **kwargs: Any,  # what `generate` passes to models that keep their states otherwise
    ) -> dict[str, Any]:
        """Return the arguments of ``forward``: the tokens that ``state`` has not seen, and the rest as given."""
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
        """Add the state that suits the batch, where `generate` would make its cache.

        Raises:
            H1ExportError: `generate` is called with an option that a Runner does not support.
        """
        for name in ("output_hidden_states", "output_attentions", "cache_implementation", "prefill_chunk_size"):
            if getattr(generation_config, name, None):
                raise H1ExportError("generate", f"an exported model does not give {name}", "leave it out")
        if model_kwargs.get(STATE) is not None:
            raise H1ExportError("generate", f"{STATE} of another call", "give the whole text as input_ids")
        if generation_config.use_cache:
            beams = generation_config.num_beams or 1
            rows = batch_size * max(beams, generation_config.num_return_sequences or 1)
            padded = model_kwargs.get("attention_mask") is not None
            model_kwargs[STATE] = State(
                open_session(self.runner, rows, max_cache_length, padded=padded, movable=beams > 1)
            )
        return False  # the method is declared to return a bool; transformers does not read it

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise H1ExportError("save_pretrained", "the weights are stored in the artifact", "copy its folder")
