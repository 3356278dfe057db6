"""The writer of golden.npz: a text and the logits that an artifact must give for it. verify_on_mac.py reads the file.

=============  ==================  ===============================================================================
array          dtype and shape     content
=============  ==================  ===============================================================================
format         int32 []            1, the version of this format
tolerance      float64 []          limit of the largest difference in a row of logits, divided by the range of the row
ids            int32 [n]           the token ids of the text
prompts        int32 [cases]       the length of each case's prompt; a case decodes the ids that follow it
steps          int32 []            the number of tokens that a case decodes
positions      int32 [p]           ascending positions in the text
logits         float16 [p, vocab]  the logits at these positions, which are the same for all cases
=============  ==================  ===============================================================================
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array, Ids
from h1export.targets.coreml.mac.verify_on_mac import FORMAT

STEPS = 4
LONGEST = 160  # tokens; each build runs one forward pass over them
TOLERANCE = 0.02  # fp16 activations and states through every layer of a large model
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date of the zip format

Arrays = Mapping[str, npt.NDArray[Any]]


def lengths(chunk: int, max_context: int, available: int = LONGEST, *, steps: int = STEPS) -> tuple[int, ...]:
    """Return prompt lengths that meet every way of cutting a prompt into chunks.

    They end within, at and after a chunk, and at the end of the context or of the ``available`` ids.
    """
    longest = min(max_context, available) - steps
    return tuple(
        sorted(
            {min(length, longest) for length in (1, chunk - 1, chunk, chunk + 1, 2 * chunk + 5, longest) if length > 0}
        )
    )


def logit_positions(prompts: Sequence[int], chunk: int, steps: int = STEPS) -> list[int]:
    """Return the positions whose logits are stored.

    They are the end of each prompt, the steps after it, and both sides of the first cut.
    """
    found = {position for length in prompts for position in range(length - 1, length + steps)}
    return sorted(found | {position for position in (0, chunk - 1, chunk) if position < max(found)})


def golden(ids: Ids, logits: Array, prompts: Sequence[int], *, positions: Sequence[int], steps: int = STEPS) -> bytes:
    """Return the bytes of golden.npz, which are the same for the same logits.

    Args:
        ids: int64 [n], the text; each case is a prefix of it.
        logits: float [positions, vocab] of the model in float32 arithmetic with the weights that the artifact stores.
        prompts: the lengths of the prompts; at least ``steps`` ids follow each prompt.
        positions: the positions of ``logits``, from ``logit_positions``.
        steps: tokens that a case decodes after its prompt, at least 1.

    Raises:
        H1ExportError: there is no prompt or no step, or a prompt does not fit into the text.
    """
    if not prompts or min(prompts) < 1 or max(prompts) + steps > len(ids) or steps < 1:
        what = f"prompts of {list(prompts)} tokens and {steps} steps, in a text of {len(ids)} tokens"
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
    """Return an .npz file whose bytes depend on ``arrays`` and their order alone; numpy.savez would store the time."""
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
