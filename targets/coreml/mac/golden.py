"""golden.npz: prompts, and the logits that an artifact has to give for them. verify_on_mac.py reads it.

=============  ==========================  ====================================================================
array          dtype and shape             content
=============  ==========================  ====================================================================
format         int32 []                    1
tolerance      float64 []                  limit for the largest difference of a row's logits, over the row's range
names          unicode [cases]             names of the cases; the arrays of case k are called "k.prompt" and so on
k.prompt       int32 [n]                   token ids
k.positions    int32 [p]                   ascending places in the prompt, the last one among them
k.prefill      float32 [p, vocab]          logits there
k.tokens       int32 [steps]               greedy continuation; the first is the argmax of the prompt's last logits
k.decode       float32 [steps, vocab]      logits after each of ``tokens``
=============  ==========================  ====================================================================
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from h1export.core.protocols import Ids, Runner
from h1export.errors import H1ExportError
from h1export.targets.coreml.mac.verify_on_mac import FORMAT

STEPS = 8
TOLERANCE = 0.02  # fp16 activations and states through every layer of a large model
PIECE = 256  # tokens of a prompt in one call, so that the logits of a long one fit
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip file can bear

Arrays = Mapping[str, npt.NDArray[Any]]


def lengths(chunk: int, max_context: int, available: int, steps: int = STEPS) -> tuple[int, ...]:
    """Prompts that meet every way of cutting, within, at and after a chunk and to the end of the context; ``available`` at most."""
    longest = min(max_context - steps, available)
    return tuple(sorted({min(length, longest) for length in (1, chunk - 1, chunk, chunk + 1, 2 * chunk + 5, longest) if length > 0}))


def golden(runner: Runner[Any], ids: Ids, prompts: Sequence[int], chunk: int, steps: int = STEPS, tolerance: float = TOLERANCE) -> bytes:
    """The bytes of golden.npz, the same for the same logits.

    Args:
        runner: gives the truth: float32 arithmetic over the weights that the artifact stores.
        ids: int64 [n]: a text; the cases are its beginnings.
        prompts: lengths of the prompts, from 1 to n.
        chunk: tokens of a prefill call; logits on both sides of the first cut are kept.
        steps: tokens of greedy continuation, at least 1.
        tolerance: see the table above.

    Raises:
        H1ExportError: lengths outside ``ids``, or no steps.
    """
    if not prompts or min(prompts) < 1 or max(prompts) > len(ids) or steps < 1:
        what = f"prompts of {list(prompts)} tokens and {steps} steps, of a text of {len(ids)}"
        raise H1ExportError("golden cases", what, "give at least one length from 1 to the text's, and one step")
    names = [f"{length} token{'s' if length > 1 else ''}" for length in prompts]
    arrays: dict[str, npt.NDArray[Any]] = {
        "format": np.array(FORMAT, np.int32),
        "tolerance": np.array(tolerance, np.float64),
        "names": np.array(names),
    }
    for number, length in enumerate(prompts):
        arrays |= {f"{number}.{name}": array for name, array in _case(runner, ids[:length], chunk, steps)}
    return pack(arrays)


def _case(runner: Runner[Any], prompt: Ids, chunk: int, steps: int) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The arrays of one case, by name."""
    last = len(prompt) - 1
    wanted = {0, last // 2, chunk - 1, chunk, last} if runner.capabilities.all_logits else {last}
    positions = sorted(place for place in wanted if 0 <= place <= last)
    states, prefill, row = runner.initial(1), [], np.zeros(0, np.float32)
    for start in range(0, len(prompt), PIECE):
        ids = prompt[start : start + PIECE]
        logits, states = runner.step(ids[None], np.ones((1, start + len(ids)), np.int64), states)
        row = logits[0, -1]
        prefill += [row if place == last else logits[0, place - start] for place in positions if 0 <= place - start < len(ids)]
    tokens, decode = [], []
    for total in range(len(prompt) + 1, len(prompt) + steps + 1):
        tokens.append(int(row.argmax()))
        logits, states = runner.step(np.array([tokens[-1:]], np.int64), np.ones((1, total), np.int64), states)
        row = logits[0, -1]
        decode.append(row)
    yield "prompt", prompt.astype(np.int32)
    yield "positions", np.array(positions, np.int32)
    yield "prefill", np.stack(prefill).astype(np.float32)
    yield "tokens", np.array(tokens, np.int32)
    yield "decode", np.stack(decode).astype(np.float32)


def pack(arrays: Arrays) -> bytes:
    """An .npz file that depends on nothing but ``arrays`` and their order: numpy's own would bear the time."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            entry, data = zipfile.ZipInfo(f"{name}.npy", EPOCH), io.BytesIO()
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            little = array.astype(array.dtype.newbyteorder("<"))
            np.lib.format.write_array(data, little, version=(1, 0), allow_pickle=False)
            archive.writestr(entry, data.getvalue())
    return out.getvalue()
