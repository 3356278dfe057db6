"""An interrupt while a stage is made leaves nothing behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from h1export.artifact import staging
from h1export.artifact.staging import staged


def test_an_interrupt_at_any_line_before_the_work_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C may arrive between any two lines: it is raised at the first, the second, ... until the work is reached."""

    def interrupted_at(count: int) -> bool:
        """Return whether the interrupt at the given line event came before the work began."""
        lines = 0

        def trace(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
            nonlocal lines
            if frame.f_code.co_filename != staging.__file__:
                return None
            if event == "line" and frame.f_code is not staging.staged.__wrapped__.__code__:  # type: ignore[attr-defined]
                lines += 1
                if lines == count:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            with staged(tmp_path / "place" / "out", False, "0123456789abcdef"):
                sys.settrace(None)
                return False
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)

    count = 1
    while interrupted_at(count):
        assert not list((tmp_path / "place").glob("*")), count
        assert not list((tmp_path / "place").glob(".*")), count
        count += 1
    assert count > 20
