"""The prequantized formats that are read: quant_method of config.json -> its two classes.

A new format is a FORMAT_format.py, a FORMAT_tensor.py, and a line in ``FORMATS``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from h1export.checkpoint.awq_format import AwqFormat
from h1export.checkpoint.awq_tensor import AwqMatrix
from h1export.checkpoint.compressed_format import CompressedFormat
from h1export.checkpoint.compressed_tensor import CompressedMatrix
from h1export.checkpoint.gptq_format import GptqFormat
from h1export.checkpoint.gptq_tensor import GptqMatrix
from h1export.checkpoint.packed_format import QUANTIZATION_CONFIG, UNQUANTISED, PackedFormat, PackedMatrix, part_name
from h1export.checkpoint.safetensors_header import TensorEntry
from h1export.errors import H1ExportError
from h1export.model.config_reader import CONFIG, ConfigReader, read_config


@dataclass(frozen=True)
class _Registered:
    """One format: the class of its description, and the class of its weights."""

    description: type[Any]
    matrix: type[PackedMatrix[Any]]


FORMATS: Mapping[str, _Registered] = {
    "gptq": _Registered(GptqFormat, GptqMatrix),
    "awq": _Registered(AwqFormat, AwqMatrix),
    "compressed-tensors": _Registered(CompressedFormat, CompressedMatrix),
}
ALL_PARTS = frozenset(part for registered in FORMATS.values() for part in registered.matrix.all_parts)
MAIN_PARTS = frozenset(registered.matrix.main_part for registered in FORMATS.values())

# The next step for methods whose checkpoints are not read. A method that is missing here gets UNQUANTISED.
NEXT_STEPS: Mapping[str, str] = {
    "auto-round": "export it from AutoRound with the format auto_gptq, auto_awq or llm_compressor",
}


def load_format(folder: Path) -> PackedFormat | None:
    """Return the format of the checkpoint in ``folder``, or None where its config.json names no quantisation.

    Raises:
        H1ExportError: the checkpoint has a quantisation that cannot be exported exactly.
    """
    found = _quantization_config(folder / CONFIG)
    return None if found is None else format_from_config(found, f"{folder / CONFIG}: {QUANTIZATION_CONFIG}")


def ignored_packed_keys(folder: Path) -> tuple[str, ...]:
    """Return the names of the keys of ``folder``'s quantization_config that decide no integer, sorted.

    Raises:
        H1ExportError: as ``load_format``.
    """
    packed_format = load_format(folder)
    config = _quantization_config(folder / CONFIG)
    return () if packed_format is None else tuple(sorted(packed_format.ignored_keys(config)))


def _quantization_config(path: Path) -> Any:
    """Return the parsed quantization_config in the file ``path``; None where there is none."""
    config = read_config(path) if path.exists() else None
    if not isinstance(config, dict):
        return None
    found = config.get(QUANTIZATION_CONFIG)
    if found is None:
        found = config.get("compression_config")  # as older releases of compressed-tensors call it
    if found is None and isinstance(config.get("quantization"), dict):
        raise H1ExportError(path, "has a key 'quantization', as MLX writes it", UNQUANTISED)
    return found


def format_from_config(config: Any, where: object = QUANTIZATION_CONFIG) -> PackedFormat:
    """Check a parsed quantization_config and return its format.

    Raises:
        H1ExportError: a key is unknown, or has a value that cannot be exported exactly; the error names ``where``.
    """
    if not isinstance(config, dict):
        raise H1ExportError(where, "not a JSON object", "download the checkpoint again")
    read = ConfigReader(config, where)
    method = config.get("quant_method")
    registered = FORMATS.get(method) if isinstance(method, str) else None
    if registered is None:
        known = ", ".join(map(repr, FORMATS))
        next_step = NEXT_STEPS.get(str(method), UNQUANTISED)
        raise read.error("quant_method", f"is {str(method)[:80]!r}, and only {known} are read", next_step)
    found: PackedFormat = registered.description.read(read)
    return found


def open_matrix(
    name: str, shape: tuple[int, ...], packed_format: PackedFormat, *, entries: Mapping[str, TensorEntry]
) -> PackedMatrix[Any]:
    """Return the packed weight ``name``; see ``PackedMatrix.open``."""
    return _of(packed_format).matrix.open(name, shape, packed_format, entries=entries)


def is_packed(name: str, packed_format: PackedFormat, entries: Mapping[str, TensorEntry]) -> bool:
    """Return whether ``entries`` hold weight ``name`` in this format."""
    return part_name(name, _of(packed_format).matrix.main_part) in entries


def packed_somehow(name: str, entries: Mapping[str, TensorEntry]) -> bool:
    """Return whether ``entries`` hold weight ``name`` in any of the formats."""
    return any(part_name(name, part) in entries for part in MAIN_PARTS)


def part_names(matrix: PackedMatrix[Any]) -> Iterator[str]:
    """Yield the names of the tensors that hold the parts of ``matrix``."""
    return (entry.name for entry in matrix.parts.values())


def _of(packed_format: PackedFormat) -> _Registered:
    return next(registered for registered in FORMATS.values() if registered.description is type(packed_format))
