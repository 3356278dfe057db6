"""Typed, checked access to the values of a config.json; every error names the key."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from h1export.errors import H1ExportError, reason
from h1export.forms import read_bytes, without_duplicates

CONFIG = "config.json"
LEAST_FLOAT32 = float(np.finfo(np.float32).smallest_normal)
MOST_FLOAT32 = float(np.finfo(np.float32).max)  # Python's numbers: a comparison with numpy's would overflow
MAX_SIZE = 1 << 24  # far above any dimension of a real model; a hostile size must not cause work


MOST_SHOWN = 120  # characters of a value in an error


def shown(value: object) -> str:
    """Return the repr of a value for an error, cut where it is long: a file's content is never printed whole."""
    if isinstance(value, int) and value.bit_length() > 4 * MOST_SHOWN:
        return f"a whole number of {value.bit_length()} bits"  # Python refuses to print the largest
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


@dataclass(frozen=True)
class ConfigReader:
    """Reads ``config`` key by key.

    Every method raises H1ExportError for other values; ``where`` names the file in errors.
    """

    config: Mapping[str, Any]
    where: object

    def error(self, key: str, what: str, next_step: str) -> H1ExportError:
        return H1ExportError(self.where, f"key {key!r} {what}", next_step)

    def must_be(self, key: str, value: object) -> None:
        """Check that the key is absent, null, or has this one value."""
        found = self.config.get(key)
        if found is not None and (found != value or type(found) is not type(value)):
            raise self.error(
                key,
                f"is {shown(found)}",
                f"only {value!r} can be exported" if value is not None else "only null can be exported",
            )

    def size(self, key: str, default: int, limit: int = MAX_SIZE) -> int:
        """Returns a positive integer of at most ``limit``."""
        value = self.config.get(key, default)
        if type(value) is not int or not 0 < value <= limit:
            raise self.error(key, f"is {shown(value)}", f"expected a whole number from 1 to {limit}")
        return value

    def optional_size(self, key: str, default: int | None) -> int | None:
        """Returns a positive integer, or None where the key is null (or absent without a default)."""
        if self.config.get(key, default) is None:
            return None
        return self.size(key, default or 0)

    def flag(self, key: str, default: bool) -> bool:
        """Returns true or false; null means the default."""
        value = self.config.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.error(key, f"is {shown(value)}", "expected true or false")
        return value

    def positive(self, key: str, default: float) -> float:
        """Returns a finite number above zero; null means the default."""
        value = self.config.get(key)
        return default if value is None else self._finite(key, value, lowest=0.0, open_end=True)

    def positives(self, key: str, count: int) -> tuple[float, ...]:
        """Returns ``count`` finite numbers above zero; null means ones."""
        values = self.config.get(key)
        if values is None:
            return (1.0,) * count
        if not isinstance(values, list) or len(values) != count:
            raise self.error(key, f"is {shown(values)}", f"expected a list of {count} numbers")
        return tuple(self._finite(key, value, lowest=0.0, open_end=True) for value in values)

    def interval(self, key: str, default: tuple[float, float]) -> tuple[float, float]:
        """[low, high] with 0 <= low < high <= infinity.

        Transformers writes infinity as ``{"__float__": "Infinity"}``.
        """
        values = self.config.get(key)
        if values is None:
            return default
        if not isinstance(values, list) or len(values) != 2:
            raise self.error(key, f"is {shown(values)}", "expected [low, high]")
        low = self._finite(key, values[0], lowest=0.0, open_end=False)
        infinite = values[1] in ({"__float__": "Infinity"}, math.inf)
        high = math.inf if infinite else self._finite(key, values[1], lowest=0.0, open_end=True)
        if low >= high:
            raise self.error(key, f"is {shown(values)}", "expected low < high")
        return low, high

    def token_ids(self, key: str, default: int) -> tuple[int, ...]:
        """Returns the token ids of a key that has one, a list of them, or null for none."""
        value = self.config.get(key, default)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(token) is not int or token < 0 for token in ids):
            raise self.error(key, f"is {shown(value)}", "expected a token id or a list of token ids")
        return tuple(ids)

    def token_id(self, key: str, default: int) -> int | None:
        """Returns one token id, or None where the key is null."""
        ids = self.token_ids(key, default)
        if isinstance(self.config.get(key), list):
            raise self.error(key, f"is {shown(self.config[key])}", "expected one token id")
        return ids[0] if ids else None

    def _finite(self, key: str, value: Any, *, lowest: float, open_end: bool) -> float:
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:  # an int may be beyond any float
            raise self.error(key, f"is {shown(value)}", "expected a finite number")
        if value and not LEAST_FLOAT32 <= abs(value) <= MOST_FLOAT32:
            raise self.error(key, f"is {shown(value)}", "expected a number that float32 can hold")
        if value < lowest or (open_end and value == lowest):
            raise self.error(
                key, f"is {shown(value)}", f"expected a number {'above' if open_end else 'of at least'} {lowest:g}"
            )
        return float(value)


def read_config(path: Path) -> Any:
    """Returns a checkpoint's config.json, parsed. Raises H1ExportError where there is none, or it is not JSON."""
    try:
        return json.loads(read_bytes(path).decode("utf-8"), object_pairs_hook=without_duplicates)
    except FileNotFoundError:
        raise H1ExportError(path, "no such file", "give a checkpoint folder in Hugging Face layout") from None
    except OSError as error:
        raise H1ExportError(path, f"cannot be read ({error.strerror})", "check the path and its permissions") from None
    except (ValueError, RecursionError) as error:
        raise H1ExportError(path, f"not readable as JSON ({reason(error)})", "download the checkpoint again") from None
