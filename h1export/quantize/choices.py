"""The precisions, group sizes and methods that a build can choose; the command line lists them without numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

QuantName = Literal["none", "int8", "int4"]
Method = Literal["rtn", "search", "awq", "gptq"]
# The default methods. int8 loses so little that no method could save any of it.
BEST: Mapping[QuantName, Method] = {"none": "rtn", "int8": "rtn", "int4": "gptq"}
CPU = "cpu"  # the default --device
GROUP_SIZES = (32, 64, 128)
