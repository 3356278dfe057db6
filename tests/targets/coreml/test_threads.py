"""What threads and forks may share of CoreML's runner, over our evaluator."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from threaded_runners import CHECKS, by_session, in_fork

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.targets.coreml.evaluator import evaluator


@pytest.fixture(params=["passed", "held"])
def artifact(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], build: Callable[..., Artifact]
) -> Artifact:
    return build(make_checkpoint(), target="coreml", state_io=request.param == "passed", max_context=128)


@pytest.mark.parametrize("check", CHECKS)
def test_sharing(artifact: Artifact, check: str) -> None:
    CHECKS[check](load_runner(artifact))


def test_magnitudes_and_threads_of_torch_are_those_of_one_thread(artifact: Artifact) -> None:
    """Two runners in four threads: torch has as many threads afterwards as before, in every thread."""
    alone: Any = load_runner(artifact)
    for seed in range(4):
        by_session(alone, seed)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        runners: list[Any] = [load_runner(artifact), load_runner(artifact)]

        def work(seed: int) -> int:
            torch.set_num_threads(3)
            by_session(runners[seed % 2], seed)
            return torch.get_num_threads()

        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(work, range(4))) == {3}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    found = [runner.magnitudes() for runner in runners]
    assert {op: max(part[op] for part in found) for op in found[0]} == alone.magnitudes()


def test_a_fork_may_load_what_a_thread_was_running(artifact: Artifact) -> None:
    """Neither the turn nor torch's threads, which a forked process does not have, are waited for there."""

    def work() -> None:
        assert not evaluator._turn.locked()
        by_session(load_runner(artifact), 0)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(1 << 20).half()  # torch has threads from here on
        with evaluator._turn:
            in_fork(work)
    finally:
        torch.set_num_threads(before)
