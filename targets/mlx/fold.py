"""Which µP multiplier goes into which tensor: mlx-lm's model applies none of them itself, but one.

mlx-lm folds multipliers into a published checkpoint while it loads it, and forgets those of the keys and values; it
leaves a folder alone whose convolution weights are [channels, taps, 1]. The exception is a tied head: the loader
multiplies its logits by lm_head_multiplier / embedding_multiplier, so that the shared table carries the embedding's
multiplier and the head is right too.
"""

from __future__ import annotations

from h1export.checkpoint.weight_expr import Multiplier
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import EMBEDDING, LM_HEAD, projection_of

CONVOLUTION = "conv1d.weight"


def multiplier_of(tensor: str, config: FalconH1Config) -> Multiplier:
    """Return the factor of each row of a checkpoint tensor in an mlx-lm folder."""
    if tensor == EMBEDDING:
        return Multiplier.scalar(config.embedding_multiplier)
    if tensor == LM_HEAD:
        return Multiplier.scalar(config.lm_head_multiplier)
    matrix = f"{tensor.removesuffix('.bias')}.weight" if tensor.endswith(".bias") else tensor
    projection = projection_of(matrix)
    if projection is None:
        return Multiplier()
    output = Multiplier(projection.output_multiplier(config))
    if matrix != tensor:  # a bias is added after the input's multiplier
        return output
    return output.times(Multiplier.scalar(projection.input_multiplier(config)))
