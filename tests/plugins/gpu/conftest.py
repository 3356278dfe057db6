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
from gpu_host import dry

Inputs = dict[str, Any]
Array = npt.NDArray[np.float64]


@pytest.fixture(scope="session", autouse=True)
def mended_interpreter() -> Iterator[None]:
    """Mend Triton's interpreter, as a dry run on a CPU does."""
    with dry.mended_interpreter():
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
