"""The checkpoints that GPTQModel wrote, and what its own kernel made of them.

tools/record_gptqmodel.py records both.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

KINDS = sorted((Path(__file__).parent / "checkpoint" / "packed").glob("gptqmodel-*"))


@dataclass(frozen=True)
class Truth:
    """The sha256 of one weight's values: float32 [rows, columns], uint8 [rows, columns], uint8 [rows, groups]."""

    dense: str
    codes: str
    zeros: str

    @classmethod
    def of(cls, *, dense: Any, codes: Any, zeros: Any) -> Truth:
        return cls(_sha256(dense, np.float32), _sha256(codes, np.uint8), _sha256(zeros, np.uint8))


def truth_of(folder: Path) -> dict[str, Truth]:
    """Return weight -> what GPTQModel makes of it."""
    found = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
    return {name: Truth(**each) for name, each in found.items()}


def _sha256(values: Any, dtype: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(np.asarray(values).astype(dtype)).tobytes()).hexdigest()
