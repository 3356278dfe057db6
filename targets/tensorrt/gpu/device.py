"""Gpu: the GPU as torch gives it, with its memory, one stream, and CUDA graphs of the calls in that stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock

import torch

from h1export.errors import H1ExportError


class Gpu:
    """The first NVIDIA GPU, and the stream in which all calls of an artifact run, one after the other.

    Attributes:
        device: torch's device.

    Raises:
        H1ExportError: torch cannot use a GPU on this machine.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise H1ExportError(
                "torch", "cannot use a GPU here", "install PyTorch's build for CUDA, and a driver that it supports"
            )
        self.device = torch.device("cuda", 0)
        self._turn = RLock()
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @property
    def handle(self) -> int:
        """The stream's CUDA handle."""
        return int(self._stream.cuda_stream)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Return a context manager inside of which torch uses the stream too, and no other thread does.

        What a call binds, launches and copies has to be done in one such context: contexts and working memory of an
        engine are shared by its sessions.
        """
        with self._turn, torch.cuda.stream(self._stream):
            yield

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Record what ``launch`` enqueues as a CUDA graph, and return the function that replays it.

        Nothing runs while it is recorded.

        Raises:
            RuntimeError: an operation cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        # "thread_local": CUDA calls of other threads do not invalidate the recording.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            launch()
        return graph.replay
