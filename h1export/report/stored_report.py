"""An artifact and what `validate` found in it, read from its folder, in the terms that a report speaks in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from h1export.artifact.artifact import REPORT, Artifact
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.tensors import projection_of, tensor_layout
from h1export.quantize.precision import Precision
from h1export.report.report import Report, Row, Verdict

OTHERS = "all else: floats, the graph, other files"
REPORT_KEYS = {field.name for field in fields(Report)} | {"passed"}
ROW_KEYS = {field.name for field in fields(Row)} | {"verdict"}
CASES = {"logits", "states", "kl", "top1"}  # a row with these figures is a case or a context


@dataclass(frozen=True)
class JudgedArtifact:
    """An artifact and its report, as JSON values."""

    artifact: Artifact
    report: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> JudgedArtifact:
        """Raises H1ExportError where there is no artifact, or no report of it in the form that this h1export writes."""
        artifact = Artifact.open(folder)
        path = folder / REPORT
        if not path.is_file():
            raise H1ExportError(folder, f"has no {REPORT}", "run `h1export validate` on it first")
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise H1ExportError(path, f"is not JSON ({error})", "run `h1export validate` again") from None
        if not (
            _has(report, REPORT_KEYS)
            and isinstance(report["rows"], list)
            and all(_has(row, ROW_KEYS) for row in report["rows"])
        ):
            raise H1ExportError(path, "has another form than this h1export writes", "run `h1export validate` again")
        return cls(artifact, report)

    @property
    def name(self) -> str:
        return self.artifact.folder.resolve().name

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        rows: Sequence[Mapping[str, Any]] = self.report["rows"]
        return rows

    @property
    def failed(self) -> list[Mapping[str, Any]]:
        return [row for row in self.rows if row["verdict"] == Verdict.FAIL]

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self.artifact.manifest.files.values())

    @property
    def counts(self) -> str:
        verdicts = [row["verdict"] for row in self.rows]
        return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in Verdict if verdict in verdicts)

    @cached_property
    def lowering(self) -> str:
        """The group of metrics in which lowering alone is judged."""
        return "stored" if any(row["against"] == "stored" for row in self.rows) else "source"

    def of(self, check: str, against: str) -> list[Mapping[str, Any]]:
        """The rows whose check begins so."""
        return [row for row in self.rows if row["check"].startswith(check) and row["against"] == against]

    def cases(self, against: str) -> list[Mapping[str, Any]]:
        """The rows of cases and contexts."""
        return [row for row in self.of("", against) if row["figures"].keys() >= CASES]

    def worst(self, against: str, figure: str) -> float | str | None:
        """Of all cases; what is not finite is text."""
        found = [row["figures"][figure] for row in self.cases(against)]
        return max(found, key=lambda value: math.inf if isinstance(value, str) else value, default=None)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Name and value, of what was measured and where."""
        manifest = self.artifact.manifest
        subject = self.report["subject"]
        packages = {**manifest.toolchain, **self.report["environment"].get("packages", {})}
        others = {name: value for name, value in self.report["environment"].items() if name != "packages"}
        return [
            ("target", manifest.target),
            ("kernels", str(subject.get("kernels", ""))),
            *((name, str(value)) for name, value in {**manifest.scheme, **manifest.options, **others}.items()),
            ("packages", ", ".join(f"{name} {version}" for name, version in sorted(packages.items()))),
            *(("note", str(note)) for note in subject.get("notes", ()) if note),
        ]

    @cached_property
    def parts(self) -> list[dict[str, Any]]:
        """What is quantised by kind of tensor: weights, bits a weight with their scales, bytes; and the rest of the files."""
        layout = tensor_layout(self.artifact.config)
        stored = {part.tensor: weight for weight in self.artifact.manifest.weights for part in weight.parts}
        found: dict[str, list[int]] = {}
        for tensor, weight in stored.items():
            height, width = layout[tensor]
            weights, bits = found.setdefault(_kind(tensor), [0, 0])
            stored_bits = Precision(weight.bits, weight.group_size).stored_bits((height, width))
            found[_kind(tensor)] = [weights + height * width, bits + stored_bits]
        rows: list[dict[str, Any]] = [
            {"kind": kind, "weights": n, "bits": bits / n, "nbytes": round(bits / 8)}
            for kind, (n, bits) in sorted(found.items())
        ]
        rest = sum(prod(shape) for tensor, shape in layout.items() if tensor not in stored)
        return [
            *rows,
            {"kind": OTHERS, "weights": rest, "bits": None, "nbytes": self.nbytes - sum(row["nbytes"] for row in rows)},
        ]


def _has(value: Any, keys: set[str]) -> bool:
    return isinstance(value, dict) and value.keys() >= keys


def _kind(tensor: str) -> str:
    projection = projection_of(tensor)
    return projection.part if projection else "others"
