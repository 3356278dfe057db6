"""Compute the integers of a checkpoint by the method of its QuantScheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from h1export.artifact.stage import Stage
from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Ids
from h1export.progress import Progress
from h1export.quantize.awq_scales import AwqScales, ScaledStore
from h1export.quantize.choices import Method
from h1export.quantize.device import CPU_DEVICE, ComputeDevice
from h1export.quantize.grid import OwnTensor
from h1export.quantize.methods.awq import search_scales, unit_scales
from h1export.quantize.methods.gptq_model import solve_model
from h1export.quantize.methods.guard import GuardRecord, held_out
from h1export.quantize.methods.prequantized import Prequantized
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.methods.scale_search import plain_rows, search_rows
from h1export.quantize.methods.tune import tune_model
from h1export.quantize.scheme import QuantScheme
from h1export.quantize.source import QuantizedWeights, Rounded, Rounding

# How each method rounds rows. For gptq this rounds an embedding, and what the guard finds better so.
ROUNDINGS: Mapping[Method, Rounding] = {
    "rtn": quantize_rows,
    "search": search_rows,
    "awq": search_rows,
    "gptq": plain_rows,
}


class Chosen(NamedTuple):
    """What a method has chosen.

    Attributes:
        store: the checkpoint's tensors as the artifact will have them.
        integers: their integers.
        guard: what the guard has found, for a method that needs a text; None otherwise, and for a dry stage.
    """

    store: WeightStore
    integers: QuantizedWeights
    guard: GuardRecord | None = None


def uncalibrated_integers(store: WeightStore, config: FalconH1Config, scheme: QuantScheme) -> QuantizedWeights:
    """Returns a checkpoint's integers without calibration: its own where it has some, and rounded weights otherwise.

    For a method that needs calibration only the precisions are final: ``integers_of`` replaces the integers.

    Raises:
        H1ExportError: integers that no runtime takes, or a scheme for weights that are in integers already.
    """
    found = Rounded(store, scheme.precisions(config), ROUNDINGS[scheme.base])
    if store.packed_format is None:
        return found
    for name in found.precisions.keys() & store.packed.keys():
        what = f"is in int{store.packed_format.bits} already, and its own integers are exported"
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
    device: ComputeDevice = CPU_DEVICE,
    own: Mapping[str, OwnTensor] = MappingProxyType({}),
) -> Chosen:
    """Returns the checkpoint's tensors as the artifact will have them, and their integers.

    ``ids`` [samples, length] are calibration tokens, for a method that needs some. In a dry ``stage`` only shapes are
    right. A method that needs a text runs the model on ``device``. GPTQ solves the tensors in ``own`` in formats that
    the target alone has; the other methods leave these to the target.

    Raises:
        H1ExportError: weights, or inputs of projections, that are not finite or too large.
    """
    guard: GuardRecord | None = None
    if scheme.base == "awq" and ids is not None:
        factors = _awq_scales(store, config, scheme, ids=ids, stage=stage, progress=progress, device=device)
        factors.save(stage.folder)
        guard = factors.guard
        store = ScaledStore(store, factors, progress)
    integers = uncalibrated_integers(store, config, scheme)
    if scheme.base == "gptq" and ids is not None and not stage.dry:
        solved = solve_model(store, config, integers, ids=ids, stage=stage, progress=progress, device=device, own=own)
        integers, guard = solved, solved.guard
    if scheme.steps and ids is not None and not stage.dry:
        integers, errors = tune_model(
            store, config, integers, steps=scheme.steps, ids=ids, stage=stage, progress=progress, device=device
        )
        guard = replace(guard or GuardRecord(held_out(len(ids))), steps=errors)
    return Chosen(store, integers, guard)


def _awq_scales(
    store: WeightStore,
    config: FalconH1Config,
    scheme: QuantScheme,
    *,
    ids: Ids,
    stage: Stage,
    progress: Progress,
    device: ComputeDevice,
) -> AwqScales:
    if stage.dry:
        return unit_scales(store, config, scheme.precisions(config))
    return search_scales(
        store, config, scheme.precisions(config), ids=ids, jobs=stage.jobs, progress=progress, device=device
    )
