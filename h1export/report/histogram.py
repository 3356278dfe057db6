"""Errors by their order of magnitude: a few counts that show how values of a wide range are spread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from h1export.forms import Count

PER_DECADE = 4
LEAST = -12 * PER_DECADE  # smaller values, zeros too, count in the first bin
MOST = 310 * PER_DECADE  # beyond every float64


@dataclass(frozen=True)
class Histogram:
    """``counts[i]`` values are at least 10 ** ((first + i) / PER_DECADE) and below the edge of the next bin."""

    first: Annotated[int, Meta(ge=LEAST, le=MOST)]
    counts: Annotated[tuple[Count, ...], Meta(max_length=MOST - LEAST)]

    @classmethod
    def of(cls, values: npt.NDArray[np.floating]) -> Histogram:
        """Count ``values``, which are not negative but for rounding.

        Those that are not finite are left out: figures show them.
        """
        finite = values[np.isfinite(values)].astype(np.float64)
        bins = np.floor(np.log10(np.maximum(finite, 10.0 ** (LEAST / PER_DECADE))) * PER_DECADE + 1e-9).astype(np.int64)
        if not len(bins):
            return cls(LEAST, ())
        first = int(bins.min())
        return cls(first, tuple(np.bincount(bins - first).tolist()))
