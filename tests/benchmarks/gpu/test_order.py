"""What the section of figures times first, what bounds the peers' autotuning, and where the ceilings come from."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from roofline import Gpu

pytestmark = pytest.mark.trt
GPU = Gpu("test", 90, 1e9, tensor=1e12)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of benchmarks/gpu, which are found from the root."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))
    from benchmarks.gpu import ceilings, clock, kernels, tuning

    return SimpleNamespace(ceilings=ceilings, clock=clock, kernels=kernels, tuning=tuning)


def bench(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, share: float, gain: float) -> Any:
    """A bench on a GPU that is not there: every case has this share, and this gain where peers are timed too."""
    row = gpu.kernels.Row

    def case_rows(case: Any, *_: Any, makers: Any, beside: str, tuned: Any) -> Iterator[Any]:
        alone = makers is not None
        assert (tuned is None) is alone
        passed = gpu.kernels.met(case, share, None if alone else gain)
        yield row(f"{case.name}{beside}: h1export", passed, {"median_us": 1.0})
        if not alone:
            yield row(f"{case.name}{beside}: mamba-ssm", None, {"median_us": gain})

    monkeypatch.setattr(gpu.kernels, "case_rows", case_rows)
    monkeypatch.setattr(gpu.kernels.torch.cuda, "empty_cache", lambda: None)
    return gpu.kernels.Bench("cuda", GPU)


@pytest.mark.parametrize(("share", "gain"), [(0.7, 0.5), (0.4, 2.0), (0.4, 0.5)])
@pytest.mark.parametrize("peers_in_time", [True, False])
def test_every_required_case_is_timed_first_and_judged_once(
    share: float, gain: float, peers_in_time: bool, *, gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench(gpu, monkeypatch, share, gain)
    own = list(made.own(end=math.inf))
    rest = list(made.peers(end=math.inf if peers_in_time else 0.0))
    for case in made.cases():
        (alone,) = [row for row in own if row.name == f"{case.name}: h1export"]
        assert alone.figures["median_us"]
        judged = [row.passed for row in own + rest if row.name.startswith(case.name) and row.passed is not None]
        if case.op != "ssm_scan" or (case.tokens == 1 and case.batch != 64):
            assert judged == []
        elif case.tokens == 1:
            assert set(judged) == {share >= 0.8}
        else:
            assert judged
            assert set(judged) == {share >= 0.6 or (peers_in_time and gain >= 1.3)}
    names = [row.name for row in own + rest]
    assert len(set(names)) == len(names)


def test_what_begins_after_the_end_is_named(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bench(gpu, monkeypatch, 0.7, 1.0)
    rows = list(made.own(end=0.0))
    assert len(rows) == len(made.cases())
    assert {row.detail for row in rows} == {"left out: the time was over"}


def test_each_kernel_of_a_prompt_is_timed_alone(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called in their order on one workspace, the kernels leave what the whole scan computes."""
    import torch

    (row,) = gpu.kernels.Bench("cpu", GPU).parts(end=math.inf)
    kernels = ("chunk_state", "state_passing", "chunk_scan")
    assert set(row.figures) == {f"{name}{what}_us" for name in kernels for what in ("", "_bound")}
    case = next(case for case in gpu.kernels.cases(True, full=False) if case.op == "ssm_scan" and case.tokens > 1)
    inputs = case.inputs("cpu")
    calls = gpu.kernels.contenders.own_kernels(inputs, "cpu")
    assert tuple(calls) == kernels
    tensors = calls["chunk_scan"].args[1]
    y, state = gpu.kernels.contenders.own("ssm_scan").call({**inputs, "state": inputs["state"].clone()})
    assert torch.equal(tensors["y"], y)
    assert torch.equal(tensors["new_state"], state)


class Config:
    """What Triton's autotuner reads of a configuration, and the seconds that it takes to compile and to run."""

    def __init__(self, compiles: float, runs: float) -> None:
        self.compiles, self.runs = compiles, runs
        self.pre_hook = None
        self.kwargs: dict[str, Any] = {}

    def all_kwargs(self) -> dict[str, Any]:
        return {"config": self}


class Kernel:
    """A kernel whose compilation takes time; calls are counted."""

    def __init__(self) -> None:
        self.ran: list[Config] = []

    def run(self, *_: Any, config: Config, **__: Any) -> Config:
        if config not in self.ran:
            time.sleep(config.compiles)
        self.ran.append(config)
        return config


def autotuner(configs: list[Config]) -> Any:
    """Triton's own autotuner over a kernel of ours; its key is the argument n."""
    from triton.runtime.autotuner import Autotuner

    kernel = Kernel()

    def do_bench(call: Any, quantiles: Any) -> list[float]:
        call()
        return [kernel.ran[-1].runs] * 3

    made = Autotuner.__new__(Autotuner)
    made.__dict__ |= {
        "fn": kernel, "base_fn": kernel, "configs": configs, "keys": ["n"], "cache": {}, "arg_names": ["n"],
        "cache_results": False, "early_config_prune": None, "perf_model": None, "_do_bench": do_bench,
        "pre_hook": lambda *_, **__: None, "post_hook": lambda *_, **__: None,
    }  # fmt: skip
    return made


@pytest.mark.parametrize("kernel_s", [0.0, 0.25, 60.0])
def test_a_search_is_bounded_and_takes_the_fastest_that_was_timed(gpu: SimpleNamespace, kernel_s: float) -> None:
    configs = [Config(0.1, math.inf), *(Config(0.1, 5.0 - at) for at in range(4))]  # the first does not run
    tuner = autotuner(configs)
    with gpu.tuning.limited(kernel_s) as tuned:
        chosen = tuner.run(1)
    timed = [config for config in configs if config in tuner.fn.ran]
    assert chosen is min(timed, key=lambda config: config.runs)
    assert math.isfinite(chosen.runs)
    assert (tuned.timed, tuned.left_out) == (len(timed), len(configs) - len(timed))
    assert (len(timed) == 2) if kernel_s == 0.0 else (len(timed) == len(configs)) is (kernel_s == 60.0)
    assert tuned.note == ("" if kernel_s == 60.0 else f"autotuning timed {len(timed)} of 5 configurations")


def test_each_search_has_its_own_time_and_the_end_bounds_all(gpu: SimpleNamespace) -> None:
    configs = [Config(0.2, 2.0), Config(0.0, 1.0), Config(0.0, 3.0)]
    tuner, other = autotuner(configs), autotuner(configs)
    with gpu.tuning.limited(0.1) as tuned:
        assert [tuner.run(1).runs, other.run(1).runs] == [2.0, 2.0]
        assert tuner.run(2).runs == 1.0  # another size: everything is compiled, and the clock starts anew
    assert tuned.timed == 5
    with gpu.tuning.limited(60.0, end=0.0):
        assert tuner.run(3).runs == 2.0
    assert tuner.run(4).runs == 1.0  # the limit is gone


def test_the_bandwidth_is_that_of_the_fastest_stream(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ceiling that a kernel exceeds is none; bytes are those read plus those written."""
    names: list[str] = []

    def timed(calls: Any, device: str, *, rounds: int) -> dict[str, Any]:
        for (call,) in calls.values():
            call()
        found = {name: gpu.clock.summary([float(next(seconds))], "graph") for name in calls}
        names.extend(found)
        return found

    size = gpu.ceilings.DRY_BUFFERS[0]
    for fastest in range(6):
        names.clear()
        seconds = (1.0 if at == fastest else 3.0 for at in itertools.count())
        monkeypatch.setattr(gpu.clock, "interleaved", timed)
        found = gpu.ceilings.measure("cpu")
        moved = size if "read" in names[fastest] else 2 * size
        assert found.gpu.bandwidth == moved
        assert found.fastest.startswith(names[fastest])
        assert found.figures()["copy_bytes_per_s"] == 2 * size / (1.0 if names[fastest] == "torch copy" else 3.0)


def test_no_stream_changes_the_values(gpu: SimpleNamespace) -> None:
    import torch

    source, target = torch.randn(4096), torch.zeros(4096)
    before = source.clone()
    for name, stream in gpu.ceilings.streams(source, target, (1024,)).items():
        target.copy_(source)
        stream.call()
        assert torch.equal(source, before), name
        assert torch.equal(target, before), name
