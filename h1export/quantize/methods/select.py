"""Each method's way from a checkpoint to integers."""

from __future__ import annotations

from collections.abc import Mapping

from h1export.artifact.staging import Stage
from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import HybridSpec
from h1export.progress import Progress
from h1export.quantize.awq_scales import ScaledStore, Scaling
from h1export.quantize.methods.awq import no_scaling, scaling
from h1export.quantize.methods.gptq_model import solve
from h1export.quantize.methods.prequantized import Ready
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.methods.scale_search import search_rows
from h1export.quantize.scheme import Method, QuantScheme
from h1export.quantize.source import Integers, Rounded, Rounding
from h1export.runtime.runner import Ids

# gptq's is that of the embedding, which no product reads
ROUNDINGS: Mapping[Method, Rounding] = {"rtn": quantize_rows, "search": search_rows, "awq": search_rows, "gptq": quantize_rows}


def rounded(store: WeightStore, spec: HybridSpec, scheme: QuantScheme) -> Integers:
    """Those of the checkpoint where it has some; the others are rounded. Where a method looks at a text, only precisions are final.

    Raises:
        H1ExportError: integers that no runtime takes, or a scheme for weights that are in integers already.
    """
    found = Rounded(store, scheme.precisions(spec), ROUNDINGS[scheme.method])
    if store.layout is None:
        return found
    for name in found.precisions.keys() & store.packed.keys():
        what = f"is in int{store.layout.bits} already, and its own integers are exported"
        raise H1ExportError(f'tensor "{name}"', what, "leave it out of --quant and --precisions, or give the unquantised checkpoint")
    return Ready.of(store, found)


def integers_of(
    store: WeightStore, spec: HybridSpec, scheme: QuantScheme, ids: Ids | None, stage: Stage, progress: Progress
) -> tuple[WeightStore, Integers]:
    """The checkpoint as an artifact holds it, and its integers.

    ``ids`` [samples, length]: calibration tokens, where the method looks at some. In a dry ``stage``, shapes alone are right.

    Raises:
        H1ExportError: weights, or inputs of products, that have no integers.
    """
    if scheme.method == "awq" and ids is not None:
        factors = _scaling(store, spec, scheme, ids, stage, progress)
        factors.save(stage.folder)
        store = ScaledStore(store, factors, progress)
    integers = rounded(store, spec, scheme)
    if scheme.method == "gptq" and ids is not None and not stage.dry:
        integers = solve(store, spec, integers, ids, stage, progress)
    return store, integers


def _scaling(store: WeightStore, spec: HybridSpec, scheme: QuantScheme, ids: Ids, stage: Stage, progress: Progress) -> Scaling:
    if stage.dry:
        return no_scaling(store, spec, scheme.precisions(spec))
    return scaling(store, spec, scheme.precisions(spec), ids, stage.jobs, progress)
