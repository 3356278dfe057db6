"""Each method's way from a checkpoint to integers."""

from __future__ import annotations

from collections.abc import Mapping

from h1export.artifact.staging import Stage
from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.progress import Progress
from h1export.quantize.awq_scales import AwqScales, ScaledStore
from h1export.quantize.methods.awq import no_scaling, scaling
from h1export.quantize.methods.gptq_model import solve
from h1export.quantize.methods.prequantized import Prequantized
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.methods.scale_search import search_rows
from h1export.quantize.scheme import Method, QuantScheme
from h1export.quantize.source import QuantizedWeights, Rounded, Rounding
from h1export.runtime.runner import Ids

# gptq's is that of the embedding, which no product reads
ROUNDINGS: Mapping[Method, Rounding] = {
    "rtn": quantize_rows,
    "search": search_rows,
    "awq": search_rows,
    "gptq": quantize_rows,
}


def rounded(store: WeightStore, config: FalconH1Config, scheme: QuantScheme) -> QuantizedWeights:
    """Those of the checkpoint where it has some; the others are rounded. Where a method looks at a text, only precisions are final.

    Raises:
        H1ExportError: integers that no runtime takes, or a scheme for weights that are in integers already.
    """
    found = Rounded(store, scheme.precisions(config), ROUNDINGS[scheme.method])
    if store.gptq_format is None:
        return found
    for name in found.precisions.keys() & store.packed.keys():
        what = f"is in int{store.gptq_format.bits} already, and its own integers are exported"
        raise H1ExportError(
            f'tensor "{name}"', what, "leave it out of --quant and --precisions, or give the unquantised checkpoint"
        )
    return Prequantized.of(store, found)


def integers_of(
    store: WeightStore,
    config: FalconH1Config,
    scheme: QuantScheme,
    *,
    ids: Ids | None,
    stage: Stage,
    progress: Progress,
) -> tuple[WeightStore, QuantizedWeights]:
    """The checkpoint as an artifact holds it, and its integers.

    ``ids`` [samples, length]: calibration tokens, where the method looks at some. In a dry ``stage``, shapes alone are right.

    Raises:
        H1ExportError: weights, or inputs of products, that have no integers.
    """
    if scheme.method == "awq" and ids is not None:
        factors = _scaling(store, config, scheme, ids=ids, stage=stage, progress=progress)
        factors.save(stage.folder)
        store = ScaledStore(store, factors, progress)
    integers = rounded(store, config, scheme)
    if scheme.method == "gptq" and ids is not None and not stage.dry:
        integers = solve(store, config, integers, ids=ids, stage=stage, progress=progress)
    return store, integers


def _scaling(
    store: WeightStore, config: FalconH1Config, scheme: QuantScheme, ids: Ids, stage: Stage, progress: Progress
) -> AwqScales:
    if stage.dry:
        return no_scaling(store, config, scheme.precisions(config))
    return scaling(store, config, scheme.precisions(config), ids=ids, jobs=stage.jobs, progress=progress)
