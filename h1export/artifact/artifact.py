"""Artifact: a built folder and its manifest.

The format is described in docs/artifact.md. Nothing in a manifest depends on a clock, a path or chance, so that one source
and one set of options give one set of bytes.
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

from h1export.artifact.files import NOT_PLAIN, names, plain_size
from h1export.artifact.journal import JOURNAL, SCRATCH
from h1export.checkpoint.weight_expr import Multiplier
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config

MANIFEST = "manifest.json"
FORMAT = 6
NO_SHA256 = 64 * "0"
REPORT = "report.json"  # written by validate into a finished artifact, so outside the manifest


@dataclass(frozen=True)
class StoredPart:
    """Where a quantised initializer holds one checkpoint tensor: ``size`` rows, or columns where the parts lie side by side.

    ``order`` names the constant that has the order of its columns, int [columns]: column i is the tensor's column order[i]. Empty: as
    they come.
    """

    tensor: str
    size: int
    multiplier: Multiplier
    order: str = ""


@dataclass(frozen=True)
class StoredWeight:
    """A quantised initializer: ``bits`` per code, one scale per ``block`` columns (0: per row), parts in order along ``axis``."""

    initializer: str
    bits: int
    group_size: int
    axis: int
    parts: tuple[StoredPart, ...]


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, what it was made from and with, and what lies in it.

    Attributes:
        target: name of the target that made it and can load it.
        source: sha256 over the checkpoint's tensors.
        spec: FalconH1Config as JSON values.
        scheme: the QuantScheme's fields.
        options: the target's options and the build switches.
        toolchain: package -> version that took part.
        inputs: graph input -> [dtype, dims].
        outputs: graph output -> [dtype, dims].
        weights: quantised initializers.
        weights_file: the file of ``files`` from which the runtime reads the weights.
        files: name -> [sha256, bytes]; slashes part a name from those of the folders that it lies in.
        passport: what the machine that runs it must have, as JSON values; empty where a target has no such demands, and then not written.
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
        """What decides an artifact's bytes, as sha256: known before any of them is written."""
        decided = dataclasses.replace(
            self, inputs={}, outputs={}, weights=(), weights_file="", files={}, requirements={}
        )
        return hashlib.sha256(decided.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        data = {name: value for name, value in dataclasses.asdict(self).items() if value or name != "requirements"}
        return json.dumps({"format": FORMAT, **_jsonable(data)}, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def parse(cls, text: str, where: Path) -> Manifest:
        """The inverse of to_json. Raises H1ExportError, naming ``where``, for anything else."""
        try:
            data = json.loads(text)
            version = data.pop("format")
            if type(version) is not int or version != FORMAT:
                raise H1ExportError(
                    where, f"format {version!r}, and this h1export reads format {FORMAT}", "build the artifact again"
                )
            data["weights"] = tuple(_stored_weight(item) for item in data["weights"])
            for side in ("inputs", "outputs"):
                data[side] = {name: (str(dtype), tuple(dims)) for name, (dtype, dims) in data[side].items()}
            data["files"] = {str(name): (_text(digest), _count(size)) for name, (digest, size) in data["files"].items()}
            for name in ("target", "source", "weights_file"):
                data[name] = _text(data[name])
            if data["weights_file"] not in data["files"]:
                raise ValueError(f"the weights' file {data['weights_file']!r} is not among the files")
            for name in ("config", "scheme", "options", "toolchain", "requirements"):
                data[name] = {**data.get(name, {})} if name == "requirements" else {**data[name]}
            return cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise H1ExportError(where, f"not a manifest of h1export ({error!r})", "build the artifact again") from None


def _jsonable(value: Any) -> Any:
    """JSON values only: tuples become lists, infinity becomes transformers' spelling of it."""
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


@dataclass(frozen=True)
class Artifact:
    """A finished folder whose files are there in full length."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> Artifact:
        """Read the manifest and check every file's size.

        Raises:
            H1ExportError: not an artifact, or files of the manifest missing, cut or grown. Other files are nobody's business.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise H1ExportError(folder, f"no {MANIFEST}", "give a folder that h1export build has made")
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise H1ExportError(path, f"cannot be read ({error.strerror})", "check its permissions") from None
        manifest = Manifest.parse(text, path)
        for name, (_, size) in manifest.files.items():
            found = plain_size(folder, name)
            if found == NOT_PLAIN:
                raise H1ExportError(
                    path, f"lists {name!r}, which is not a plain file of the folder", "build the artifact again"
                )
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes, and the manifest says {size}"
                raise H1ExportError(folder / name, what, "build the artifact again")
        return cls(folder, manifest)

    def check_hashes(self) -> None:
        """Raises H1ExportError where a file's sha256 is not the manifest's."""
        for name, (digest, _) in self.manifest.files.items():
            if _sha256(self.folder / name) != digest:
                raise H1ExportError(self.folder / name, "was changed after the build", "build the artifact again")

    @property
    def config(self) -> FalconH1Config:
        """The architecture, from the artifact's own copy of config.json."""
        return FalconH1Config.load(self.folder)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_table(folder: Path, sizes_only: bool = False) -> dict[str, tuple[str, int]]:
    """name -> (sha256, bytes) of every file below ``folder`` but a stage's own; zeros for a sha256 where only sizes are asked for.

    Raises:
        H1ExportError: something that no manifest may list, such as a symbolic link.
    """
    table = {}
    for name in names(folder):
        if name == JOURNAL or name.startswith(f"{SCRATCH}/"):
            continue
        size = plain_size(folder, name)
        if size is None or size == NOT_PLAIN:
            raise H1ExportError(folder / name, "is not a plain file", "a target writes plain files and folders only")
        table[name] = (NO_SHA256 if sizes_only else _sha256(folder / name), size)
    return table
