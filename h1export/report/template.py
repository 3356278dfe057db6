"""The templates of pages, in the package's assets: every text in them is escaped, and numbers have one form."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template


def template(name: str, **filters: Callable[[Any], str]) -> Template:
    """Return a template of the assets, which may include others; ``filters`` are further ones, by name."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, loader=FunctionLoader(_source)
    )
    environment.filters |= {"exact": exact, "short": short, **filters}
    return environment.get_template(name)


def _source(name: str) -> str:
    return files("h1export").joinpath("assets", name).read_text(encoding="utf-8")


def exact(value: float | None) -> str:
    """Return a number as JSON files spell it."""
    if value is None:
        return ""
    return json.dumps(value) if math.isfinite(value) else str(value)


def short(value: float | None) -> str:
    """Return a number with four digits."""
    if value is None:
        return "n/a"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
