"""Errors by their order of magnitude: a few counts that say how values of a wide range are spread."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PER_DECADE = 4
LEAST = -12 * PER_DECADE  # smaller values, zeros too, count as of the first bin


@dataclass(frozen=True)
class Histogram:
    """``counts[i]`` values lie from 10 ** ((first + i) / PER_DECADE) up to a bin further."""

    first: int
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: npt.NDArray[np.floating]) -> Histogram:
        """Of values that are no less than nothing but for rounding; what is not finite is left out, as figures say that it is there."""
        finite = values[np.isfinite(values)].astype(np.float64)
        bins = np.floor(np.log10(np.maximum(finite, 10.0 ** (LEAST / PER_DECADE))) * PER_DECADE + 1e-9).astype(np.int64)
        if not len(bins):
            return cls(LEAST, ())
        first = int(bins.min())
        return cls(first, tuple(np.bincount(bins - first).tolist()))
