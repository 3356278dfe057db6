"""The converters for torch-tensorrt, with stand-ins for its modules (they need a GPU) and TensorRT-RTX's registry."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from h1export.errors import H1ExportError
from h1export.plugins import h1
from h1export.targets.tensorrt.plugin.schema import OPS
from h1export.validate.accuracy.logits import relative_error
from h1export.validate.accuracy.reference import Reference

SCAN, CONV = OPS
MODULE = "h1export.integrations.torch_tensorrt"


class Network:
    """A network that records the plugin layers that are added to it."""

    def __init__(self) -> None:
        self.layers: list[tuple[list[Any], list[Any], Any]] = []

    def add_plugin_v3(self, tensors: list[Any], shapes: list[Any], plugin: Any) -> Any:
        self.layers.append((tensors, shapes, plugin))
        return SimpleNamespace(name="", get_output=lambda index: f"{len(self.layers)}.{index}")


@pytest.fixture
def converters() -> dict[Any, Any]:
    """Op -> the converter that was registered for it."""
    return {}


@pytest.fixture
def integration(converters: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The integration module, with TensorRT-RTX in the place of TensorRT."""
    rtx = importlib.import_module("tensorrt_rtx")

    def register(key: Any, **options: Any) -> Callable[[Any], Any]:
        return lambda function: converters.setdefault(key, SimpleNamespace(convert=function, **options)).convert

    def tensor(context: Any, value: Any, name: str) -> Any:
        return (
            value if isinstance(value, SimpleNamespace) else SimpleNamespace(name=name, dtype=rtx.float32, value=value)
        )

    def cast(context: Any, value: Any, dtype: Any, name: str) -> Any:
        return value if value.dtype == dtype else SimpleNamespace(name=name, dtype=dtype, value=value)

    conversion = SimpleNamespace(dynamo_tensorrt_converter=register)
    stand_ins = {
        "tensorrt": rtx,
        "torch_tensorrt": ModuleType("torch_tensorrt"),
        "torch_tensorrt.dynamo": ModuleType("dynamo"),
        "torch_tensorrt.dynamo.conversion": conversion,
        "torch_tensorrt.dynamo.conversion.converter_utils": SimpleNamespace(
            get_trt_tensor=tensor, cast_trt_tensor=cast
        ),
    }
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module(MODULE)
    del sys.modules[MODULE]


@pytest.fixture
def plugin(driver: Path) -> None:
    """The library with stand-ins for machine code, in RTX's registry, which keeps it until the process ends."""
    rtx: Any = importlib.import_module("tensorrt_rtx")
    rtx.get_plugin_registry().load_library(str(driver / "libh1export_plugin.so"))


def tensors(trt: Any, names: list[str], dtype: Any) -> list[Any]:
    return [SimpleNamespace(name=name, dtype=dtype, shape=(40, 1, 4)) for name in names]


@pytest.mark.usefixtures("plugin")
def test_a_scan_becomes_a_layer_of_the_plugin(integration: ModuleType, converters: dict[Any, Any]) -> None:
    trt: Any = integration.trt
    arguments = [*tensors(trt, SCAN.inputs, trt.float16), 128, 0.0, math.inf]
    context = SimpleNamespace(net=Network())
    registered = converters[h1.ssm_scan.default]
    assert registered.supports_dynamic_shapes
    assert registered.convert(context, "target", arguments, {}, "layer") == ("1.0", "1.1")
    ((taken, shapes, made),) = context.net.layers
    wide = ("A", "D", "dt_bias", "state")
    assert [one.dtype for one in taken] == [trt.float32 if name in wide else trt.float16 for name in SCAN.inputs]
    assert [one.name for one in taken if one.name in SCAN.inputs] == [name for name in SCAN.inputs if name not in wide]
    assert (shapes, type(made).__name__) == ([], "IPluginV3")


@pytest.mark.usefixtures("plugin")
def test_a_convolution_without_a_bias_gets_zeros(integration: ModuleType, converters: dict[Any, Any]) -> None:
    trt: Any = integration.trt
    arguments = [*tensors(trt, CONV.inputs[:3], trt.bfloat16), None]
    context = SimpleNamespace(net=Network())
    converters[h1.causal_conv.default].convert(context, "target", arguments, {}, "layer")
    ((taken, _, _),) = context.net.layers
    bias = taken[3].value.value
    assert {one.dtype for one in taken} == {trt.bfloat16}
    assert not bias.any()
    assert bias.shape == (40,)


@pytest.mark.usefixtures("plugin")
def test_attributes_that_the_plugin_refuses(integration: ModuleType) -> None:
    trt: Any = integration.trt
    arguments = [*tensors(trt, SCAN.inputs, trt.float16), 128, 2.0, 1.0]
    with pytest.raises(H1ExportError, match="h1::ssm_scan: the plugin refuses"):
        integration.convert(SimpleNamespace(net=Network()), SCAN, arguments, name="layer")


def test_without_the_plugin(integration: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "VERSION", "0")
    with pytest.raises(H1ExportError, match="TensorRT does not have the plugin; call register before"):
        integration.convert(
            SimpleNamespace(net=Network()),
            CONV,
            tensors(integration.trt, CONV.inputs, integration.trt.float16),
            name="layer",
        )


def test_float32_stays_with_torch(integration: ModuleType, converters: dict[Any, Any]) -> None:
    takes = converters[h1.ssm_scan.default].capability_validator
    for dtype, taken in ((torch.float32, False), (torch.float16, True), (torch.bfloat16, True)):
        node = SimpleNamespace(args=[SimpleNamespace(meta={"val": torch.empty(1, dtype=dtype)})])
        assert takes(node, None) == taken


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_the_model_is_the_checkpoint_s(
    name: str, integration: ModuleType, make_checkpoint: Callable[..., Path]
) -> None:
    """The result is exact in float32 and close in fp16, where torch-tensorrt computes every activation in fp16."""
    checkpoint = make_checkpoint(name)
    ids = np.arange(11)
    expected = Reference(checkpoint).full(ids)[0]
    for dtype, limit in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
        model = integration.load(checkpoint, dtype)
        with torch.no_grad():
            logits, after = model(
                torch.from_numpy(ids)[None], torch.ones(1, 11, dtype=torch.int64), integration.zero_states(model)
            )
        assert relative_error(logits[0].float().numpy(), expected) <= limit
        assert [state.dtype for state in after[0]] == [dtype, dtype, dtype, torch.float32]
        assert logits.dtype == dtype


def test_attention_is_decomposed(integration: ModuleType, make_checkpoint: Callable[..., Path]) -> None:
    """The exported graph holds only those of our ops for which there are converters."""
    model = integration.load(make_checkpoint(), torch.float16)
    states = integration.zero_states(model, past=5)
    exported = torch.export.export(
        model, (torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 8, dtype=torch.int64), states), strict=False
    )
    graph = exported.run_decompositions(dict(integration.DECOMPOSITIONS)).graph
    assert {node.target for node in graph.nodes if "h1" in str(node.target)} == {
        h1.ssm_scan.default,
        h1.causal_conv.default,
    }


def test_a_process_holds_one_plugin(
    integration: ModuleType, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same library may be registered again; TensorRT refuses another library with the same op names."""
    asked: list[str] = []
    registry = SimpleNamespace(load_library=lambda path: None if asked else asked.append(path) or path)
    monkeypatch.setattr(integration, "trt", SimpleNamespace(get_plugin_registry=lambda: registry, __version__="11.0"))
    monkeypatch.setattr(integration, "gpu_architecture", lambda: 86)
    monkeypatch.setattr(
        integration.plugin,
        "compile_all",
        lambda wanted, architectures: [(kernel.dtype, *architectures) for kernel in wanted],
    )
    monkeypatch.setattr(integration.plugin, "library", lambda compiled: tmp_path / compiled[0][0])
    assert integration.register(tiny) == integration.register(tiny, torch.bfloat16) == tmp_path / "bf16"
    assert asked == [str(tmp_path / "bf16")]
    with pytest.raises(H1ExportError, match=r"this process has .*bf16 already"):
        integration.register(tiny, torch.float16)
    integration._loaded.clear()
    with pytest.raises(H1ExportError, match=r"TensorRT 11.0 does not load the plugin"):
        integration.register(tiny)
