"""golden.npz: a text, and the logits that an artifact has to give within it. verify_on_mac.py reads it.

=============  ========================  =======================================================================
array          dtype and shape           content
=============  ========================  =======================================================================
format         int32 []                  1
tolerance      float64 []                tolerance for the largest difference of a row's logits, over the row's range
ids            int32 [n]                 the text
prompts        int32 [cases]             a case takes so many of the ids as its prompt, and decodes those that follow
steps          int32 []                  how many a case decodes
positions      int32 [p]                 ascending places in the text
logits         float16 [p, vocab]        logits there, the same whichever way a case came to them
=============  ========================  =======================================================================
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array
from h1export.runtime.runner import Ids
from h1export.targets.coreml.mac.verify_on_mac import FORMAT

STEPS = 4
LONGEST = 160  # tokens: one forward of them is part of a build
TOLERANCE = 0.02  # fp16 activations and states through every layer of a large model
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip file can bear

Arrays = Mapping[str, npt.NDArray[Any]]


def lengths(chunk: int, max_context: int, available: int = LONGEST, steps: int = STEPS) -> tuple[int, ...]:
    """Prompts that meet every way of cutting: within, at and after a chunk, and to the end of the context or of ``available`` ids."""
    longest = min(max_context, available) - steps
    return tuple(
        sorted(
            {min(length, longest) for length in (1, chunk - 1, chunk, chunk + 1, 2 * chunk + 5, longest) if length > 0}
        )
    )


def places(prompts: Sequence[int], chunk: int, steps: int = STEPS) -> list[int]:
    """Where logits are kept: at each prompt's end and in the steps after it, and on both sides of the first cut."""
    found = {place for length in prompts for place in range(length - 1, length + steps)}
    return sorted(found | {place for place in (0, chunk - 1, chunk) if place < max(found)})


def golden(ids: Ids, logits: Array, prompts: Sequence[int], positions: Sequence[int], steps: int = STEPS) -> bytes:
    """The bytes of golden.npz, the same for the same logits.

    Args:
        ids: int64 [n]: a text; the cases are its beginnings.
        logits: float [positions, vocab] of the model in float32 arithmetic over the weights that the artifact stores.
        prompts: lengths of the prompts; each leaves ``steps`` ids.
        positions: where ``logits`` are, as ``places`` gives them.
        steps: tokens that a case decodes after its prompt, at least 1.

    Raises:
        H1ExportError: lengths that do not fit, or no steps.
    """
    if not prompts or min(prompts) < 1 or max(prompts) + steps > len(ids) or steps < 1:
        what = f"prompts of {list(prompts)} tokens and {steps} steps, of a text of {len(ids)}"
        raise H1ExportError("golden cases", what, "give at least one length, and one step, that fit into the text")
    return pack(
        {
            "format": np.array(FORMAT, np.int32),
            "tolerance": np.array(TOLERANCE, np.float64),
            "ids": ids.astype(np.int32),
            "prompts": np.array(prompts, np.int32),
            "steps": np.array(steps, np.int32),
            "positions": np.array(positions, np.int32),
            "logits": logits.astype(np.float16),
        }
    )


def pack(arrays: Arrays) -> bytes:
    """An .npz file that depends on nothing but ``arrays`` and their order: numpy's own would bear the time."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", EPOCH)
            data = io.BytesIO()
            entry.create_system = 3
            entry.external_attr = 0o644 << 16
            little = array.astype(array.dtype.newbyteorder("<"))
            np.lib.format.write_array(data, little, version=(1, 0), allow_pickle=False)
            archive.writestr(entry, data.getvalue())
    return out.getvalue()
