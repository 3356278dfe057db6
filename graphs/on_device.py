"""Run graphs/model.py itself on a CPU or a GPU, as an example of a caller: weights, states and greedy decoding.

On a GPU the ops run their Triton kernels. A Decoder steps in states of fixed length, so that a step is one CUDA graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.graphs.model import FalconH1, LayerStates, Mixer, layer_states, mup_vector
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateKind, StateSpec
from h1export.model.falcon_h1.tensors import EMBEDDING, LM_HEAD

# parameters of a mixer that enter exponents and sums of float32; a 16-bit model keeps them in float32 too
WIDE = ("A_log", "D", "dt_bias")
WARM_UP_CALLS = 3  # before a capture, as PyTorch's notes on CUDA graphs advise


def load_model(
    store: WeightStore, config: FalconH1Config, device: torch.device, *, dtype: torch.dtype = torch.float32
) -> FalconH1:
    """Return the model with the weights of ``store`` on ``device``, in ``dtype`` but for the parameters WIDE."""
    with torch.device("meta"):
        model = FalconH1(config).eval()
    weights = {}
    for name in model.state_dict():
        source = EMBEDDING if name == LM_HEAD and config.tie_word_embeddings else name
        values = torch.from_numpy(store.rows(source, 0, store.shape(source)[0]))
        kept = torch.float32 if name.rpartition(".")[2] in WIDE else dtype
        weights[name] = values.to(device, kept)
    model.load_state_dict(weights, assign=True)
    for module in model.modules():
        if isinstance(module, Mixer):
            module.mup = mup_vector(config).to(device, dtype)
    return model


def empty_states(config: FalconH1Config, batch: int, device: torch.device, *, dtype: torch.dtype) -> list[LayerStates]:
    """Return the states before the first token: zeros in ``dtype``, and recurrent states in float32."""
    return layer_states(
        [
            torch.zeros(
                tensor.sized(batch, 0),
                dtype=torch.float32 if tensor.kind is StateKind.RECURRENT else dtype,
                device=device,
            )
            for tensor in StateSpec.of(config).tensors
        ]
    )


@torch.no_grad()
def generate(model: FalconH1, ids: Tensor, steps: int) -> Tensor:
    """Return the ``steps`` greedy tokens after the prompts ids, int64 [batch, steps].

    ``ids`` is int64 [batch, seq] without pads, on the device of the model.
    """
    weight = model.lm_head.weight
    states = empty_states(model.config, len(ids), ids.device, dtype=weight.dtype)
    mask = torch.ones_like(ids)
    logits, states = model(ids, mask, states)
    tokens = [logits[:, -1:].argmax(-1)]
    if steps > 1:
        decoder = Decoder(model, states, mask, length=ids.shape[1] + steps - 1)
        for _ in range(steps - 1):
            tokens.append(decoder.step(tokens[-1]).argmax(-1))
    return torch.cat(tokens, dim=1)


class Decoder:
    """Decodes a token at a time in keys and values of a fixed length; on a GPU a step is one captured CUDA graph.

    The tokens so far stand at the right end of the buffers, and columns without a token are pads on the left. A step
    drops the leftmost column.

    Args:
        model: the model, on the device of the states.
        states: the states after the tokens so far; they are copied.
        mask: int64 [batch, tokens so far], 1 for tokens and 0 for pads, which are on the left only.
        length: the tokens that the buffers hold, those so far among them.

    Raises:
        H1ExportError: there are more tokens so far than ``length``.
    """

    @torch.no_grad()
    def __init__(self, model: FalconH1, states: list[LayerStates], mask: Tensor, *, length: int) -> None:
        self._room = length - mask.shape[1]
        if self._room < 0:
            raise H1ExportError("Decoder", f"{mask.shape[1]} tokens do not fit in {length}", "give a larger length")
        self._model = model
        self._ids = torch.zeros_like(mask[:, :1])
        self._mask = F.pad(F.pad(mask, (self._room, 0)), (0, 1), value=1)
        self._states = [
            (F.pad(key, (0, 0, self._room, 0)), F.pad(value, (0, 0, self._room, 0)), conv.clone(), recurrent.clone())
            for key, value, conv, recurrent in states
        ]
        self._logits: Tensor | None = None
        self._graph = self._captured() if mask.is_cuda else None

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Return the logits [batch, 1, vocab] after one more token of each sequence, int64 [batch, 1].

        Raises:
            H1ExportError: the buffers are full.
        """
        if self._room == 0:
            what = f"the buffers of {self._mask.shape[1] - 1} tokens are full"
            raise H1ExportError("Decoder", what, "give a larger length")
        self._room -= 1
        self._ids.copy_(ids)
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        assert self._logits is not None
        return self._logits.clone()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """Return the graph of `_run`; the calls before it compile the kernels and leave the states as they are."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                self._model(self._ids, self._mask, self._states)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        return graph

    def _run(self) -> None:
        """Compute the logits and write the new states and mask over the old ones."""
        self._logits, after = self._model(self._ids, self._mask, self._states)
        for old, (key, value, conv, recurrent) in zip(self._states, after, strict=True):
            for buffer, new in zip(old, (key[:, :, 1:], value[:, :, 1:], conv, recurrent), strict=True):
                buffer.copy_(new)
        self._mask.copy_(F.pad(self._mask[:, 1:], (0, 1), value=1))
