"""The rewrites between trace and targets. One pass a file; the order is this list and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from h1export.graphs.passes.base import Pass, PassError
from h1export.graphs.passes.drop_metadata_asserts import DropMetadataAsserts
from h1export.graphs.passes.fold_decay import FoldDecay
from h1export.graphs.passes.fold_head_multiplier import FoldHeadMultiplier
from h1export.graphs.passes.fold_input_multipliers import FoldInputMultipliers
from h1export.graphs.passes.fold_output_multipliers import FoldOutputMultipliers
from h1export.graphs.programs import Program
from h1export.graphs.verify import verify

PASSES: tuple[Pass, ...] = (
    DropMetadataAsserts(),  # first: nothing below should have to look past them
    FoldDecay(),
    FoldHeadMultiplier(),  # before the output multipliers, which would fold it into a head that may be tied
    FoldOutputMultipliers(),
    FoldInputMultipliers(),
)

__all__ = ["PASSES", "Pass", "PassError", "run_passes"]


def run_passes(program: Program, passes: Sequence[Pass] = PASSES) -> Program:
    """Apply ``passes`` in order to a copy of ``program``; the result is verified, so they must do all that PASSES do.

    Raises:
        PassError: a pass met a graph it does not understand, or did not reach what it promises.
        VerifyError: the result has an op that no target is asked to know.
    """
    program = program.editable()
    for rewrite in passes:
        rewrite.requires(program)
        rewrite.run(program)
        program.graph.eliminate_dead_code()
        rewrite.ensures(program)
    program.module.recompile()
    verify(program)
    return program
