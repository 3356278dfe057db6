"""The precisions, group sizes and methods that a build can choose; the command line lists them without numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, get_args

from h1export.errors import H1ExportError

QuantName = Literal["none", "int8", "int4"]
Method = Literal["rtn", "search", "awq", "gptq"]
Preset = Literal["small", "balanced"]  # named rules, see presets.py
Step = Literal["round", "scales"]  # what may follow a method, to tune its integers by the model's predictions
# The default methods. int8 loses so little that no method could save any of it.
BEST: Mapping[QuantName, Method] = {"none": "rtn", "int8": "rtn", "int4": "gptq"}
CPU = "cpu"  # the default --device
GROUP_SIZES = (32, 64, 128)
AUTO: Final = "auto"  # leaves the embedding to the other choices
Embedding = Literal["auto", "int4", "int8", "fp16"]
# What --embedding says -> the integers that it means; floats are those of the target, which has to have fp16.
OF_EMBEDDING: Mapping[str, QuantName] = {"int4": "int4", "int8": "int8", "fp16": "none"}
JOINED = "+"  # between a method and its steps, as in gptq+round+scales


def parse_method(words: str) -> tuple[Method, tuple[Step, ...]]:
    """Returns the method and its steps of a word such as gptq+round+scales.

    Raises:
        H1ExportError: an unknown method or step, or a step that comes twice.
    """
    name, *steps = words.split(JOINED)
    methods: Mapping[str, Method] = {method: method for method in get_args(Method)}
    known: Mapping[str, Step] = {step: step for step in get_args(Step)}
    if name not in methods:
        raise H1ExportError("--method", f"{words!r} is unknown", f"one of {', '.join(methods)}")
    for place, step in enumerate(steps):
        if step not in known or step in steps[:place]:
            what = f"{words!r} has {step!r} twice" if step in known else f"{words!r} has the unknown step {step!r}"
            raise H1ExportError("--method", what, f"add each of {', '.join(known)} once at most, as in gptq+scales")
    return methods[name], tuple(known[step] for step in steps)
