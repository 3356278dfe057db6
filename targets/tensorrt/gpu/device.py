"""A GPU through torch: its memory, a stream, and CUDA graphs of what is launched there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from h1export.errors import H1ExportError


class Gpu:
    """The first NVIDIA GPU, and the one stream in which everything of an artifact runs, one call after the other.

    Raises:
        H1ExportError: torch cannot use a GPU here.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise H1ExportError(
                "torch", "cannot use a GPU here", "install PyTorch's build for CUDA, and a driver that it supports"
            )
        self.device = torch.device("cuda", 0)
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @property
    def handle(self) -> int:
        """The stream, as a number."""
        return int(self._stream.cuda_stream)

    def current(self) -> AbstractContextManager[None]:
        """Inside, torch works in the stream too."""
        return torch.cuda.stream(self._stream)

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        """What ``launch`` puts into the stream, as a graph: nothing runs now, and all of it when the result is called.

        Raises:
            RuntimeError: something of it cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, stream=self._stream, capture_error_mode="thread_local"
        ):  # other threads may do what they like
            launch()
        return graph.replay
