"""Trace a checkpoint's model and run passes on it, without writing anything."""

from __future__ import annotations

from pathlib import Path

from h1export.checkpoint.packed_formats import load_format
from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.graphs.passes import passes_for, run_passes
from h1export.graphs.program import Program
from h1export.graphs.trace import trace
from h1export.model.falcon_h1.config import FalconH1Config

NO_PASS = "none"


def traced(checkpoint: Path, after: str | None = None) -> Program:
    """Returns the Program of ``checkpoint`` after the pass named ``after``.

    None means after all passes, and "none" before all passes.

    Weights are not read, and for a checkpoint that is not quantised already they need not be there.

    Raises:
        H1ExportError: a checkpoint that cannot be exported, or an unknown pass.
    """
    config = FalconH1Config.load(checkpoint)
    if load_format(checkpoint) is None:
        passes = passes_for(lambda _: "")
    else:
        passes = passes_for(WeightStore.open(checkpoint, config).order_name)
    names = [NO_PASS, *(rewrite.name for rewrite in passes)]
    if after is not None and after not in names:
        raise H1ExportError("--after", f"{after!r} is not a pass", f"give one of {', '.join(names)}")
    program = trace(config)
    if after is None:
        return run_passes(program, passes)
    edited = program.editable()
    for rewrite in passes[: names.index(after)]:
        rewrite.apply(edited)
    return edited.finished()
