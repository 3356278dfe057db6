"""Fixtures that write safetensors files byte by byte and damage them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def _write(file: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def _split(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


@pytest.fixture(scope="session")
def write_safetensors() -> Callable[..., Path]:
    """write_safetensors(file, header, data) -> file; ``header`` is a JSON value, or bytes written as they are."""
    return _write


@pytest.fixture(scope="session")
def read_safetensors() -> Callable[[Path], tuple[dict[str, Any], bytes]]:
    """read_safetensors(file) -> its header as JSON values, and its data."""
    return _split


@pytest.fixture(scope="session")
def edit_header() -> Callable[[Path, Callable[[dict[str, Any]], object]], None]:
    """edit_header(file, change) rewrites ``file`` with its header changed in place by ``change``."""

    def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
        header, data = _split(file)
        change(header)
        _write(file, header, data)

    return edit
