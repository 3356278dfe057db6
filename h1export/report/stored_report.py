"""An artifact and what `validate` found in it, read from the artifact's folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from h1export.artifact.artifact import REPORT, Artifact
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.tensors import projection_of, tensor_shapes
from h1export.quantize.precision import Precision
from h1export.report.checks import CheckKind, Comparison, Phase
from h1export.report.report import Report, Row, Verdict

OTHERS = "all else: floats, the graph, other files"


@dataclass(frozen=True)
class JudgedArtifact:
    """An artifact and its report."""

    artifact: Artifact
    report: Report

    @classmethod
    def open(cls, folder: Path) -> JudgedArtifact:
        """Read both from ``folder``.

        Raises:
            H1ExportError: no artifact, or no report in the form that this h1export writes.
        """
        artifact = Artifact.open(folder)
        path = folder / REPORT
        if not path.is_file():
            raise H1ExportError(folder, f"has no {REPORT}", "run `h1export validate` on it first")
        return cls(artifact, Report.read(path))

    @property
    def name(self) -> str:
        return self.artifact.folder.resolve().name

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.report.rows

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.verdict is Verdict.FAIL]

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self.artifact.manifest.files.values())

    @property
    def counts(self) -> str:
        """How many rows have each verdict, in words."""
        verdicts = [row.verdict for row in self.rows]
        return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in Verdict if verdict in verdicts)

    @cached_property
    def lowering(self) -> Comparison:
        """The comparison that shows lowering alone."""
        stored = any(row.comparison is Comparison.STORED for row in self.rows)
        return Comparison.STORED if stored else Comparison.SOURCE

    def rows_of(self, kind: CheckKind, comparison: Comparison, phase: Phase | None = None) -> list[Row]:
        """Return the rows of this kind, comparison and phase."""
        return [row for row in self.rows if (row.kind, row.comparison, row.phase) == (kind, comparison, phase)]

    def figure(
        self, kind: CheckKind, figure: str, phase: Phase | None = None, *, comparison: Comparison = Comparison.SOURCE
    ) -> float | None:
        """Return a figure of the first row of this kind, phase and comparison; None where there is none."""
        rows = self.rows_of(kind, comparison, phase)
        return rows[0].figures.get(figure) if rows else None

    def outputs(self, comparison: Comparison) -> list[Row]:
        """Return the rows of ``comparison`` that compare logits and states: cases and contexts."""
        return [row for row in self.rows if row.comparison is comparison and row.compares_outputs]

    def worst(self, comparison: Comparison, figure: str) -> float | None:
        """Return the largest value of this figure in ``outputs``, NaN counted as infinite; None without such rows."""
        found = [row.figures[figure] for row in self.outputs(comparison)]
        return max(found, key=lambda value: math.inf if math.isnan(value) else value, default=None)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Name and value of the artifact's settings, the kernels and the machine."""
        manifest = self.artifact.manifest
        subject = self.report.subject
        environment = self.report.environment
        packages = {**manifest.toolchain, **environment.get("packages", {})}
        others = {name: value for name, value in environment.items() if name != "packages"}
        return [
            ("target", manifest.target),
            ("kernels", str(subject.get("kernels", ""))),
            *((name, str(value)) for name, value in {**manifest.scheme, **manifest.options, **others}.items()),
            ("packages", ", ".join(f"{name} {version}" for name, version in sorted(packages.items()))),
            *(("note", str(note)) for note in subject.get("notes", ()) if note),
        ]

    @cached_property
    def parts(self) -> list[dict[str, Any]]:
        """A line per kind of quantised tensor (weights, bits a weight with scales, bytes), and one for all else."""
        shapes = tensor_shapes(self.artifact.config)
        stored = {part.tensor: weight for weight in self.artifact.manifest.weights for part in weight.parts}
        found: dict[str, list[int]] = {}
        for tensor, weight in stored.items():
            height, width = shapes[tensor]
            weights, bits = found.setdefault(_kind(tensor), [0, 0])
            stored_bits = Precision(weight.bits, weight.group_size).stored_bits((height, width))
            found[_kind(tensor)] = [weights + height * width, bits + stored_bits]
        rows: list[dict[str, Any]] = [
            {"kind": kind, "weights": n, "bits": bits / n, "nbytes": round(bits / 8)}
            for kind, (n, bits) in sorted(found.items())
        ]
        rest = sum(prod(shape) for tensor, shape in shapes.items() if tensor not in stored)
        return [
            *rows,
            {"kind": OTHERS, "weights": rest, "bits": None, "nbytes": self.nbytes - sum(row["nbytes"] for row in rows)},
        ]


def _kind(tensor: str) -> str:
    projection = projection_of(tensor)
    return projection.part if projection else "others"
