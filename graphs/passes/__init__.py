"""The passes between trace and targets, one pass a file. The lists below are the only place that orders them."""

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
    """Returns the passes for a target whose runtime does not fuse projections itself, to be run after PASSES.

    Args:
        kind_of: gives the kind of a weight, such as its precision; only weights of equal kind are fused.
        align: the columns of the largest group; weights are placed side by side only in multiples of it.
    """
    return (
        FuseParallelProjections(kind_of),
        FuseSummedProjections(kind_of, align),
        FlattenSplits(),  # after the projections, whose fusion makes splits of splits
    )


def passes_for(order_name: Callable[[str], str]) -> tuple[Pass, ...]:
    """Returns all passes between trace and targets.

    ``order_name`` names the order that a tensor's integers have their columns in (``WeightStore.order_name``).
    """
    return (*PASSES, SortColumns(order_name))


def run_passes(program: Program, passes: Sequence[Pass] = PASSES) -> Program:
    """Apply ``passes`` in order to a copy of ``program``, and verify the result.

    The result's ``rewrites`` have the number of places that each pass rewrote.

    Raises:
        PassError: a pass met a graph that it does not understand, or did not reach what it promises.
        VerifyError: the result is not what targets may expect, for example because PASSES never ran on it.
    """
    edited = program.editable()
    for rewrite in passes:
        rewrite.apply(edited)
    verify(edited)
    return edited.finished()


__all__ = ["PASSES", "KindOf", "Pass", "PassError", "fusions", "passes_for", "run_passes"]
