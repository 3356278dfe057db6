"""The manifest of an artifact: what was built, from which checkpoint, with which options, and the sha256 of every file.

docs/artifact.md describes the JSON format. A manifest holds no time, no path and no random value, so the same
checkpoint and the same options give the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from h1export.checkpoint.weight_expr import Multiplier
from h1export.errors import H1ExportError, reason

MANIFEST = "manifest.json"
FORMAT = 5


@dataclass(frozen=True)
class StoredPart:
    """One checkpoint tensor inside a quantised initializer.

    Attributes:
        tensor: name of the checkpoint tensor.
        size: its rows, or its columns where the parts are concatenated along axis 1.
        multiplier: the float32 factor of each row, which carries µP.
        order: name of the int constant [columns] that holds the order of the stored columns: stored column i is column
            order[i] of the tensor. Empty where the columns are stored in the tensor's own order.
    """

    tensor: str
    size: int
    multiplier: Multiplier
    order: str = ""


@dataclass(frozen=True)
class StoredWeight:
    """A quantised initializer of an exported graph.

    Attributes:
        initializer: its name in the graph.
        bits: bits of a code.
        group_size: columns that share a scale; 0: one scale per row.
        axis: the axis along which the parts are concatenated.
        parts: the checkpoint tensors that it holds, in order along ``axis``.
    """

    initializer: str
    bits: int
    group_size: int
    axis: int
    parts: tuple[StoredPart, ...]


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, what it was made from and with, and which files it consists of.

    Attributes:
        target: name of the target that made the artifact and can load it.
        source: sha256 over the checkpoint's tensors.
        config: the fields of FalconH1Config as JSON values.
        scheme: the fields of the QuantScheme.
        options: the target's options and the build switches.
        toolchain: package -> version, for every package that took part in the build.
        inputs: graph input -> (dtype, dimensions).
        outputs: graph output -> (dtype, dimensions).
        weights: the quantised initializers.
        weights_file: the file of ``files`` that holds the weights.
        files: file name relative to the artifact, with slashes -> (sha256, bytes).
        requirements: what the machine that runs the artifact must have, as JSON values. The key is left out of the JSON
            where a target has no requirements.
    """

    target: str
    source: str
    config: Mapping[str, Any]
    scheme: Mapping[str, Any]
    options: Mapping[str, Any]
    toolchain: Mapping[str, str]
    inputs: Mapping[str, tuple[str, tuple[int | str, ...]]]
    outputs: Mapping[str, tuple[str, tuple[int | str, ...]]]
    weights: tuple[StoredWeight, ...]
    weights_file: str
    files: Mapping[str, tuple[str, int]]
    requirements: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The sha256 of everything that decides the artifact's bytes; it is known before the first byte is written."""
        unknown: dict[str, Any] = {
            "inputs": {},
            "outputs": {},
            "weights": (),
            "weights_file": "",
            "files": {},
            "requirements": {},
        }
        decided = dataclasses.replace(self, **unknown)
        return hashlib.sha256(decided.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Return the manifest as JSON text with sorted keys.

        Raises:
            ValueError: a value is NaN, which JSON cannot hold.
        """
        data = {name: value for name, value in dataclasses.asdict(self).items() if value or name != "requirements"}
        return json.dumps({"format": FORMAT, **_jsonable(data)}, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def parse(cls, text: str, where: Path) -> Manifest:
        """Read what ``to_json`` wrote.

        Raises:
            H1ExportError: ``text`` is not a manifest, or is of another format version; the error names ``where``.
        """
        try:
            data = json.loads(text)
            version = data.pop("format")
            if type(version) is not int or version != FORMAT:
                raise H1ExportError(
                    where,
                    f"the manifest has format {version!r}, and this h1export reads format {FORMAT}",
                    "build the artifact again",
                )
            data["weights"] = tuple(_stored_weight(item) for item in data["weights"])
            for side in ("inputs", "outputs"):
                data[side] = {name: (str(dtype), tuple(dims)) for name, (dtype, dims) in data[side].items()}
            data["files"] = {str(name): (_text(digest), _count(size)) for name, (digest, size) in data["files"].items()}
            for name in ("target", "source", "weights_file"):
                data[name] = _text(data[name])
            if data["weights_file"] not in data["files"]:
                raise ValueError(f"the weights' file {data['weights_file']!r} is not among the files")
            for name in ("config", "scheme", "options", "toolchain"):
                data[name] = {**data[name]}
            data["requirements"] = {**data.get("requirements", {})}
            return cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise H1ExportError(
                where,
                f"not a manifest of h1export ({type(error).__name__}: {reason(error)})",
                "build the artifact again",
            ) from None


def _jsonable(value: Any) -> Any:
    """Return JSON values only: tuples become lists, and infinity is spelled as transformers spells it."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return {"__float__": "Infinity"} if isinstance(value, float) and math.isinf(value) else value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{str(value)[:80]} is not a text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:80]} is not a count")
    return value


def _stored_weight(data: Mapping[str, Any]) -> StoredWeight:
    parts = tuple(
        StoredPart(
            _text(part["tensor"]), _count(part["size"]), _multiplier(part["multiplier"]), order=_text(part["order"])
        )
        for part in data["parts"]
    )
    bits, group_size, axis = (_count(data[name]) for name in ("bits", "group_size", "axis"))
    return StoredWeight(_text(data["initializer"]), bits, group_size, axis=axis, parts=parts)


def _multiplier(data: Mapping[str, Any]) -> Multiplier:
    return Multiplier(tuple((_count(rows), float(factor)) for rows, factor in data["runs"]))
