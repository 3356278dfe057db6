"""Converters of the h1 ops for torch-tensorrt, as layers of our plugin. Importing this module needs an NVIDIA GPU.

``load`` returns a model that torch-tensorrt can compile, and ``register`` loads the plugin that its engines need;
docs/tensorrt.md has an example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt
import torch
from torch_tensorrt.dynamo.conversion import dynamo_tensorrt_converter
from torch_tensorrt.dynamo.conversion.converter_utils import cast_trt_tensor, get_trt_tensor

from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.graphs.model import FalconH1, LayerStates, layer_states
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateKind, StateSpec, StateTensor
from h1export.plugins import h1
from h1export.plugins.attention.op import composed
from h1export.plugins.gpu.kernel import DTYPES, KERNEL_DTYPE
from h1export.targets.tensorrt import plugin
from h1export.targets.tensorrt.engine.requirements import gpu_architecture
from h1export.targets.tensorrt.plugin.schema import NAMESPACE, OPS, VERSION, Op

_loaded: list[Path] = []  # the plugin's library, once TensorRT has loaded it
HALVES = (torch.float16, torch.bfloat16)
EXACT = ("A_log", "D", "dt_bias")  # parameters of the scan that the plugin reads in float32
FIELDS: Mapping[str, tuple[type[np.generic], Any]] = {
    "int": (np.int32, trt.PluginFieldType.INT32),
    "float": (np.float32, trt.PluginFieldType.FLOAT32),
}
DECOMPOSITIONS: Mapping[Any, Callable[..., Any]] = {
    h1.attention.default: composed
}  # for ExportedProgram.run_decompositions


def load(checkpoint: str | Path, dtype: torch.dtype = torch.bfloat16) -> FalconH1:
    """Load the model in the folder ``checkpoint`` onto the CPU; its states are inputs and outputs, see graphs/model.py.

    All activations have ``dtype``. The residual streams of trained models exceed the range of float16.

    Raises:
        H1ExportError: h1export does not export this checkpoint.
    """
    config = FalconH1Config.load(Path(checkpoint))
    store = WeightStore.open(Path(checkpoint), config)
    model = FalconH1(config).eval()
    for name, parameter in model.named_parameters():
        values = torch.from_numpy(store.rows(name, 0, len(parameter))).view(parameter.shape)
        parameter.data = values if name.endswith(EXACT) else values.to(dtype)
    for vector in model.buffers():  # µP
        vector.data = vector.to(dtype)
    return model


def zero_states(model: FalconH1, batch: int = 1, past: int = 0) -> list[LayerStates]:
    """Return the states of ``model`` before the first token, on the device of its weights.

    ``past`` is the number of columns of keys and values that are reserved, and masked.
    """
    like = model.lm_head.weight

    def zeros(tensor: StateTensor) -> torch.Tensor:
        dtype = torch.float32 if tensor.kind is StateKind.RECURRENT else like.dtype
        return torch.zeros(tensor.sized(batch, past), dtype=dtype, device=like.device)

    return layer_states([zeros(tensor) for tensor in StateSpec.of(model.config).tensors])


def register(checkpoint: str | Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Compile the plugin for the model in ``checkpoint`` and for this machine's GPU, and load it into TensorRT.

    Returns the plugin's library. A process can hold one: that of one dtype, head dim, state size and number of taps.

    Raises:
        H1ExportError: There is no GPU, no compiler or no kernel for the architecture or the sizes, or TensorRT does not
            load the plugin.
    """
    config = FalconH1Config.load(Path(checkpoint))
    wanted = plugin.kernels(config.mamba_d_head, config.mamba_d_state, config.mamba_d_conv, dtype=DTYPES[dtype])
    library = plugin.library(plugin.compile_all(wanted, (gpu_architecture(),)))
    if _loaded and library not in _loaded:
        raise H1ExportError(
            library, f"this process has {_loaded[0]} already", "use another process for a model of other sizes"
        )
    if not _loaded and trt.get_plugin_registry().load_library(str(library)) is None:
        raise H1ExportError(library, f"TensorRT {trt.__version__} does not load the plugin", "see what it logged")
    _loaded[:] = [library]
    return library


def convert(context: Any, op: Op, arguments: Sequence[Any], *, name: str) -> tuple[Any, ...]:
    """Add one layer of the plugin, and return its outputs: the op's own and the state after it.

    Raises:
        H1ExportError: The plugin was not registered, or refuses the attributes.
    """
    given = dict(zip((argument.name for argument in op.schema.arguments), arguments, strict=True))
    own = get_trt_tensor(context, given["x"], f"{name}_x").dtype
    tensors = []
    for each in op.inputs:
        value = np.zeros(given["weight"].shape[0], np.float32) if given[each] is None else given[each]  # no bias
        tensor = get_trt_tensor(context, value, f"{name}_{each}")
        tensors.append(
            cast_trt_tensor(
                context, tensor, own if op.kind(each) == KERNEL_DTYPE else trt.float32, f"{name}_{each}_cast"
            )
        )
    layer = context.net.add_plugin_v3(tensors, [], _instance(op, given, name))
    layer.name = name
    return tuple(layer.get_output(index) for index in range(2))


def _instance(op: Op, given: Mapping[str, Any], name: str) -> Any:
    creator = trt.get_plugin_registry().get_creator(op.name, VERSION, NAMESPACE)
    if creator is None:
        raise H1ExportError(
            f"h1::{op.space}", "TensorRT does not have the plugin", "call register before torch_tensorrt compiles"
        )
    attributes = [
        ("state_in_place", "int", 0),
        *((attribute, kind, given[attribute]) for attribute, kind in op.attributes),
    ]
    fields = [
        trt.PluginField(field, np.array([value], FIELDS[kind][0]), FIELDS[kind][1]) for field, kind, value in attributes
    ]
    made = creator.create_plugin(name, trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    if made is None:
        raise H1ExportError(f"h1::{op.space}", f"the plugin refuses {attributes}", "see what TensorRT logged")
    return made


def _takes(node: torch.fx.Node, *_: Any) -> bool:
    """Return whether the plugin computes the op; in other dtypes torch does."""
    x: Any = node.args[0]
    return x.meta["val"].dtype in HALVES


def _register(op: Op) -> None:
    @dynamo_tensorrt_converter(
        getattr(torch.ops.h1, op.space).default, capability_validator=_takes, supports_dynamic_shapes=True
    )
    def converter(
        context: Any, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str
    ) -> tuple[Any, ...]:
        return convert(context, op, args, name=name)


for _op in OPS:
    _register(_op)
