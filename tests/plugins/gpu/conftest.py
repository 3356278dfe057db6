"""The devices that the tests run GPU kernels on, and the float64 recurrence that the scan must equal.

The devices are Triton's interpreter on a CPU, with bfloat16 mended to act as on a GPU, and a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gpu_dispatch import MODULES

Inputs = dict[str, Any]
Array = npt.NDArray[np.float64]


@pytest.fixture(scope="session", autouse=True)
def mended_interpreter() -> Iterator[None]:
    """Mend bfloat16 in Triton's interpreter, which holds it as uint16, and the ends of loops in that of Triton 3.6.

    Products multiply the bits as integers, and casts truncate instead of rounding. Triton 3.6 reads the end of a loop
    from an array of one element, which NumPy 2.5 refuses.
    """
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot
    cast = InterpreterBuilder.cast_impl

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounding_cast(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, source, to)
        rounded = torch.from_numpy(np.array(source.data)).bfloat16()
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    patch_tensor = interpreter._patch_lang_tensor

    def with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", with_index)
        patch.setattr(
            InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
        )
        patch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)
        patch.setattr(InterpreterBuilder, "create_fp_trunc", rounding_cast)
        yield


@pytest.fixture(scope="session", params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that the kernels run on."""
    device: torch.device = torch.device("cpu") if request.param == "interpreter" else request.getfixturevalue("cuda")
    return device


@pytest.fixture(scope="session")
def recurrence() -> Callable[..., tuple[Array, Array]]:
    """recurrence(inputs, absolute=False) -> y and the last state in float64, computed one token at a time.

    With ``absolute``, terms lose their signs, so that nothing cancels.
    """

    def run(inputs: Inputs, absolute: bool = False) -> tuple[Array, Array]:
        sign = np.abs if absolute else np.positive
        x, B, C, D, S = (sign(inputs[name].double().numpy()) for name in ("x", "B", "C", "D", "state"))
        A = inputs["A"].double().numpy()
        mask = inputs["mask"].double().numpy()
        dt = np.logaddexp(0, inputs["dt"].double().numpy() + inputs["dt_bias"].double().numpy())
        dt = np.clip(dt, inputs["dt_min"], inputs["dt_max"]) * mask[..., None]
        of_head = np.arange(x.shape[2]) // (x.shape[2] // B.shape[2])
        B = B[:, :, of_head]
        C = C[:, :, of_head]
        y = np.empty_like(x)
        for t in range(x.shape[1]):
            S = np.exp(dt[:, t] * A)[..., None, None] * S + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            y[:, t] = (S * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t]
        return y, S

    return run


DISPATCH_SIZES: dict[str, Inputs] = {
    "ssm_scan": {"batch": 2, "groups": 2, "heads_per_group": 2, "d_head": 32, "d_state": 64, "pads": (3,)},
    "causal_conv": {"batch": 3, "channels": 40, "pads": (2,)},
}


@pytest.fixture
def make(scan_inputs: Callable[..., Inputs], conv_inputs: Callable[..., Inputs]) -> Callable[..., Inputs]:
    makers = {"ssm_scan": scan_inputs, "causal_conv": conv_inputs}
    return lambda op, **sizes: makers[op](**DISPATCH_SIZES[op] | sizes)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """ "kernels" or "reference" for each call so far."""
    calls: list[str] = []
    for module in MODULES.values():
        for owner, name, label in (
            (module, "reference", "reference"),
            (module.launch, module.__name__.split(".")[-2], "kernels"),
        ):
            real = getattr(owner, name)

            def spy(*args: Any, real: Any = real, label: str = label, **kwargs: Any) -> Any:
                calls.append(label)
                return real(*args, **kwargs)

            monkeypatch.setattr(owner, name, spy)
    return calls
