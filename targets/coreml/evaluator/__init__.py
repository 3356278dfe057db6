"""Reference evaluator of saved CoreML programs: package.py reads, compiler.py resolves, evaluator.py runs."""

from __future__ import annotations

from h1export.targets.coreml.evaluator.evaluator import Evaluator
from h1export.targets.coreml.evaluator.package import Package

__all__ = ["Evaluator", "Package"]
