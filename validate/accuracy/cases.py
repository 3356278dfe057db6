"""The calls that have broken exports of hybrid models before."""

from __future__ import annotations

from dataclasses import dataclass

from h1export.model.falcon_h1.config import FalconH1Config


@dataclass(frozen=True)
class Case:
    """A sequence of calls.

    Attributes:
        name: the case's name in reports.
        calls: the number of tokens of each call.
        pads: the number of pads on the left of each row of the batch.
        quick: whether ``validate --quick`` runs it. Together these cases have prefills, decode steps and states that
            are carried on.
    """

    name: str
    calls: tuple[int, ...]
    pads: tuple[int, ...] = (0,)
    quick: bool = False

    @property
    def length(self) -> int:
        return sum(self.calls)


def cases(config: FalconH1Config) -> tuple[Case, ...]:
    """Return the cases for ``config``, whose convolution and chunk set the lengths that matter."""
    chunk = config.mamba_chunk_size
    return (
        Case("one token", (1,), quick=True),
        Case("shorter than conv", (config.mamba_d_conv - 1,)),
        Case("chunk - 1", (max(1, chunk - 1),)),
        Case("one chunk", (chunk,)),
        Case("chunk + 1", (chunk + 1,)),
        Case("512 decode steps", (8, *[1] * 512)),
        Case("ragged chunks", (7, 16, 1, 2, 33, 11), quick=True),
        Case("padded batch of 3", (29, 1, 1, 1), pads=(0, 9, 25)),
    )
