"""A conversation and its states in a file: safetensors, whose header names the artifact that computed them."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateSpec
from h1export.runtime.continued import Continued
from h1export.runtime.saved_states import SavedStates
from h1export.writing import replacing, unwritten

FORMAT = "h1export-states-1"
IDS = "ids"
MOST_HEADER = 32 << 20  # bytes; a conversation is far shorter
NEXT = "save it again with `h1export chat`"


@dataclass(frozen=True)
class StateFile:
    """What a state file holds.

    Attributes:
        artifact: ``Artifact.identity`` of the artifact that computed the states.
        messages: The conversation, each message with "role" and "content".
        sequence: The tokens and their states.
    """

    artifact: str
    messages: Sequence[Mapping[str, str]]
    sequence: Continued

    def write(self, path: Path) -> None:
        """Write the file, which appears complete or not at all. Only a state file is replaced.

        Raises:
            H1ExportError: ``path`` is something else, or cannot be written.
        """
        arrays: dict[str, npt.NDArray[Any]] = {
            IDS: np.array(self.sequence.ids, np.int64),
            **self.sequence.states.arrays,
        }
        text = json.dumps(list(self.messages))
        metadata = {
            "format": FORMAT,
            "artifact": self.artifact,
            "messages": text,
            "sha256": _digest(arrays, text),
        }
        try:
            if os.path.lexists(path) and not _is_state_file(path):
                raise H1ExportError(path, "exists, and is no saved chat", "choose another name")
            contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            with replacing(path) as stream:
                stream.write(save(contiguous, metadata))
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise unwritten(path, error) from None

    @classmethod
    def read(cls, path: Path, artifact: str, config: FalconH1Config) -> StateFile:
        """Read what ``write`` wrote for the artifact of that identity.

        Raises:
            H1ExportError: ``path`` is no state file, is damaged, or is of another artifact.
        """
        metadata = _metadata(path)
        if metadata.get("format") != FORMAT:
            raise H1ExportError(path, "is no saved chat", NEXT)
        if metadata.get("artifact") != artifact:
            raise H1ExportError(path, "was saved with another artifact", "give the artifact that it was saved with")
        text = metadata.get("messages", "")
        messages = _messages(path, text)
        arrays = _arrays(path, config)
        if metadata.get("sha256") != _digest(arrays, text):
            raise H1ExportError(path, "has another conversation or other states than were saved", NEXT)
        ids = arrays.pop(IDS)
        if ids.min() < 0 or ids.max() >= config.vocab_size:
            raise H1ExportError(path, "has tokens outside the vocabulary", NEXT)
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise H1ExportError(path, "has states that are not finite", NEXT)
        states = SavedStates(0, len(ids), arrays)
        return cls(artifact, messages, Continued(tuple(int(token) for token in ids), states))


def _check_file(path: Path) -> None:
    """Check what a reader relies on: a regular file whose header is not too long, and lies in it."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise H1ExportError(path, "is not a regular file", "give a file that `h1export chat` has saved")
        with path.open("rb") as stream:
            prefix = stream.read(8)
    except OSError as error:
        raise H1ExportError(path, f"cannot be read ({error.strerror})", "check the path and its permissions") from None
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
    if not 0 < length <= min(MOST_HEADER, found.st_size - 8):
        raise H1ExportError(path, "is no saved chat, or is cut short", NEXT)


def _metadata(path: Path) -> Mapping[str, str]:
    _check_file(path)
    try:
        with safe_open(path, "numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        raise H1ExportError(path, "is no saved chat, or is damaged", NEXT) from None


def _is_state_file(path: Path) -> bool:
    try:
        return _metadata(path).get("format") == FORMAT
    except H1ExportError:
        return False


def _messages(path: Path, text: str) -> list[dict[str, str]]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    fits = isinstance(found, list) and all(
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and all(isinstance(value, str) for value in message.values())
        for message in found
    )
    if not fits:
        raise H1ExportError(path, "has no conversation", NEXT)
    return list(found or [])


def _arrays(path: Path, config: FalconH1Config) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays, once their names, dtypes and shapes are those of the model's states."""
    spec = StateSpec.of(config)
    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            kind, shape = found.get(IDS, ("", ()))
            length = shape[0] if len(shape) == 1 else 0
            expected = {tensor.key: ("F32", tensor.sized(1, length)) for tensor in spec.tensors}
            if not 0 < length <= config.max_position_embeddings or found != {**expected, IDS: ("I64", (length,))}:
                raise H1ExportError(path, f"has other arrays than {length} tokens of this model {kind}".rstrip(), NEXT)
            return {name: file.get_tensor(name) for name in found}
    except (SafetensorError, OSError, ValueError):
        raise H1ExportError(path, "is damaged", NEXT) from None


def _digest(arrays: Mapping[str, npt.NDArray[Any]], messages: str) -> str:
    """Return the sha256 of the messages and of the arrays' bytes in the order of their names."""
    found = hashlib.sha256(messages.encode())
    for name in sorted(arrays):
        found.update(np.ascontiguousarray(arrays[name]).data)
    return found.hexdigest()
