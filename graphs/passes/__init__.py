"""The rewrites between trace and targets. One pass a file; the order is this list and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from h1export.graphs.passes.base import KindOf, Pass, PassError
from h1export.graphs.passes.drop_metadata_asserts import DropMetadataAsserts
from h1export.graphs.passes.flatten_splits import FlattenSplits
from h1export.graphs.passes.fold_decay import FoldDecay
from h1export.graphs.passes.fold_head_multiplier import FoldHeadMultiplier
from h1export.graphs.passes.fold_input_multipliers import FoldInputMultipliers
from h1export.graphs.passes.fold_output_multipliers import FoldOutputMultipliers
from h1export.graphs.passes.fuse_parallel_projections import FuseParallelProjections
from h1export.graphs.passes.fuse_summed_projections import FuseSummedProjections
from h1export.graphs.passes.sort_columns import SortColumns
from h1export.graphs.program import Program
from h1export.graphs.verify import verify

PASSES: tuple[Pass, ...] = (
    DropMetadataAsserts(),  # first: nothing below should have to look past them
    FoldDecay(),
    FoldHeadMultiplier(),  # before the output multipliers, which would fold it into a head that may be tied
    FoldOutputMultipliers(),
    FoldInputMultipliers(),
)


def fusions(kind_of: KindOf, align: int) -> tuple[Pass, ...]:
    """The passes of a target whose runtime has no fusion of its own, to run after PASSES.

    Args:
        kind_of: what weights must have in common to share an initializer: the target's precision of them.
        align: columns of a block, which a concatenation along columns may not cut.
    """
    return (
        FuseParallelProjections(kind_of),
        FuseSummedProjections(kind_of, align),
        FlattenSplits(),  # after the projections, whose fusion makes splits of splits
    )


def passes_for(order_name: Callable[[str], str]) -> tuple[Pass, ...]:
    """All that stands between trace and targets, for a checkpoint whose integers have their columns in these orders."""
    return (*PASSES, SortColumns(order_name))


__all__ = ["PASSES", "KindOf", "Pass", "PassError", "fusions", "passes_for", "run_passes"]


def run_passes(program: Program, passes: Sequence[Pass] = PASSES) -> Program:
    """Apply ``passes`` in order to a copy of ``program``; the result is verified, so all that PASSES do must be done by then.

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
