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
from typing import Annotated, Any

from msgspec import Meta

from h1export import forms
from h1export.checkpoint.weight_expr import Multiplier
from h1export.errors import H1ExportError
from h1export.forms import Count, FileName, Sha256
from h1export.model.config_reader import shown

MANIFEST = "manifest.json"
FORMAT = 5
AGAIN = "build the artifact again"

Port = tuple[str, tuple[Count | str, ...]]  # dtype, and dimensions: a size, or the name of one that varies


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
    size: Count
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
    bits: Annotated[int, Meta(ge=1, le=8)]
    group_size: Count
    axis: Annotated[int, Meta(ge=0, le=1)]
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
    source: Sha256
    config: Mapping[str, Any]
    scheme: Mapping[str, Any]
    options: Mapping[str, Any]
    toolchain: Mapping[str, str]
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    weights: tuple[StoredWeight, ...]
    weights_file: str
    files: Mapping[FileName, tuple[Sha256, Count]]
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
    def read(cls, path: Path) -> Manifest:
        """Read the manifest at ``path``.

        Raises:
            H1ExportError: it cannot be read, or is not a manifest of this format version.
        """
        return cls.parse(forms.content(path, AGAIN), path)

    @classmethod
    def parse(cls, text: str | bytes, where: Path) -> Manifest:
        """Read what ``to_json`` wrote.

        Raises:
            H1ExportError: ``text`` is not a manifest, or is of another format version; the error names ``where``.
        """
        try:
            data = forms.from_json(text)
            if not isinstance(data, dict) or "format" not in data:
                raise forms.FormError("it has no format")
            version = data.pop("format")
            if type(version) is not int or version != FORMAT:
                what = f"the manifest has format {shown(version)}, and this h1export reads format {FORMAT}"
                raise H1ExportError(where, what, AGAIN)
            manifest = forms.fill(cls, data)
            if manifest.weights_file not in manifest.files:
                raise forms.FormError(f"weights_file {shown(manifest.weights_file)} is not among the files")
            return manifest
        except forms.FormError as error:
            raise H1ExportError(where, f"not a manifest of h1export ({error})", AGAIN) from None

    def check_weights(self, where: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that the weights hold tensors of a model, each once and whole.

        Args:
            where: the manifest, for the error.
            shapes: the shapes of the model's tensors by name.

        Raises:
            H1ExportError: they do not.
        """
        seen: set[str] = set()
        for index, weight in enumerate(self.weights):
            for part in weight.parts:
                shape = shapes.get(part.tensor, ())
                if len(shape) != 2 or part.tensor in seen:
                    what = "a tensor twice" if part.tensor in seen else "a tensor that the model of config.json lacks"
                    raise H1ExportError(where, f"weight {index} holds {what}", AGAIN)
                seen.add(part.tensor)
                if part.size != shape[weight.axis]:
                    what = f"weight {index} holds {part.size} of {shape[weight.axis]} rows or columns of a tensor"
                    raise H1ExportError(where, what, AGAIN)
                if weight.group_size and shape[1] % weight.group_size:
                    what = f"weight {index} has groups of {weight.group_size} in {shape[1]} columns"
                    raise H1ExportError(where, what, AGAIN)
                rows = sum(count for count, _ in part.multiplier.runs)
                if not part.multiplier.is_scalar and rows != shape[0]:
                    raise H1ExportError(where, f"weight {index} has factors of {rows} of {shape[0]} rows", AGAIN)


def _jsonable(value: Any) -> Any:
    """Return JSON values only: tuples become lists, and infinity is spelled as transformers spells it."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return {"__float__": "Infinity"} if isinstance(value, float) and math.isinf(value) else value
