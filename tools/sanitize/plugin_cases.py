"""Hostile calls of the TensorRT plugin: other sizes, ranks, dtypes, attributes and engines than the ops take."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

from gpu_host import plugin_driver
from gpu_host.plugin_driver import CONV, SCAN, SCAN_FIELDS, Harness, case, sizes_of, tensors
from roofline import PUBLISHED

from h1export.plugins.gpu.cubin import ARCHITECTURES
from h1export.targets.tensorrt.plugin import build, kernels
from h1export.targets.tensorrt.plugin.embed import write_sources

FLAGS = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SIZES = (0, 1, -1, -2, 2, 3, 7, 16, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**33, 2**61, 2**62, 2**63 - 1)
RANKS = (-1, 0, 1, 2, 5, 8, 9, 60)
INTEGERS = ("i 0", "i 1", "i 2", "i -1", f"i {2**31 - 1}", f"i {-(2**31)}", "l 3", "f nan", "f inf", "f -1", "f 0")
CASES_A_PROCESS = 500


def compile_plugin(folder: Path) -> Harness:
    """Build the plugin with stand-ins for machine code, the stand-in for CUDA's driver and the harness, sanitized."""
    shapes = dict.fromkeys((shape.d_head, shape.d_state, shape.taps) for shape in PUBLISHED)
    wanted = dict.fromkeys(
        kernel for shape in shapes for dtype in ("fp16", "bf16") for kernel in kernels(*shape, dtype=dtype)
    )
    source = write_sources(folder / "source", plugin_driver.stand_ins(wanted, ARCHITECTURES))
    # GCC's sanitizers are a library of their own, so that a plugin may be linked without undefined names
    with mock.patch.dict(os.environ, {"CXX": "g++", "CXXFLAGS": " ".join(FLAGS)}):
        made = build(source, folder / "build")
    plugin_driver.compile_programs(folder, source, FLAGS)
    # the harness frees nothing, as its process ends soon
    options = {"ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0"}
    return Harness(folder, made, {"LD_LIBRARY_PATH": str(folder / plugin_driver.STAND_IN)} | options)


def _changed(text: str, rng: random.Random) -> str:
    """Return an input's text with another dtype, rank or size."""
    kind, _, *sizes = text.split()
    match rng.randrange(6):
        case 0:
            kind = rng.choice("hbfd")
        case 1:
            rank = rng.choice(RANKS)
            sizes = [rng.choice([*sizes, "1"]) for _ in range(max(0, rank))]
            return " ".join((kind, str(rank), *sizes))
        case _ if sizes:
            at = rng.randrange(len(sizes))
            sizes[at] = str(max(-(2**63), min(2**63 - 1, rng.choice((*SIZES, int(sizes[at]) + rng.choice((-1, 1)))))))
    return " ".join((kind, str(len(sizes)), *sizes))


def _inputs(given: list[str], rng: random.Random) -> list[str]:
    found = list(given)
    for _ in range(rng.randrange(1, 3)):
        at = rng.randrange(len(found))
        match rng.randrange(10):
            case 0:
                found.insert(at, rng.choice(found))
            case 1 if len(found) > 1:
                del found[at]
            case _:
                found[at] = _changed(found[at], rng)
    return found


def _fields(given: Mapping[str, str], rng: random.Random) -> dict[str, str]:
    found = dict(given)
    name = rng.choice([*found, "unknown"])
    if rng.randrange(3) == 0:
        found.pop(name, None)
    else:
        found[name] = rng.choice(INTEGERS)
    return found


def hostile_cases(seed: int, count: int) -> Iterator[str]:
    """Yield ``count`` lines for the harness; every eighth is a valid call."""
    rng = random.Random(seed)
    for index in range(count):
        op = rng.choice((SCAN, CONV))
        sizes = sizes_of(rng.choice(PUBLISHED), rng.choice((1, 2, 3, 70000)), rng.choice((1, 2, 128, 300, 2**31 - 1)))
        good = tensors(op, sizes, rng.choice(("fp16", "bf16")))
        fields = SCAN_FIELDS if op is SCAN else {"state_in_place": "i 0"}
        if index % 8 == 0:
            small = tensors(op, sizes_of(PUBLISHED[1], 2, rng.choice((1, 300))), "fp16")
            yield case(op, small, fields)
            continue
        yield case(
            op,
            _inputs(good, rng) if rng.randrange(3) else good,
            _fields(fields, rng) if rng.randrange(4) == 0 else fields,
            gpu=rng.choice((80, 80, 86, 90, 75, 0, -1)),
            refused=int(rng.randrange(20) == 0),
            in_place=int(rng.randrange(6) == 0),
            tamper=rng.choice((0, 0, 0, 0, 1, 2, 3, 4, 5)),
            called=_inputs(good, rng) if rng.randrange(2) else (),
        )


def run(folder: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Run the cases, and return how many calls were computed and how many refused, and the last lines of a death."""
    harness = compile_plugin(folder)
    cases = list(hostile_cases(seed, count))
    counts = {"computed": 0, "refused": 0, "valid": 0}
    for first in range(0, count, CASES_A_PROCESS):
        some = cases[first : first + CASES_A_PROCESS]
        found = harness(some)
        if len(found) != len(some) or any(line.startswith("died") for line in found[-1]):
            raise RuntimeError("\n".join([*found[-1], f"in case {first + len(found) - 1}: {some[len(found) - 1]}"]))
        for at, lines in enumerate(found, first):
            computed = "enqueued 0" in lines
            counts["computed" if computed else "refused"] += 1
            counts["valid"] += computed and at % 8 == 0
    if counts["valid"] != len(cases[::8]):
        raise RuntimeError(f"only {counts['valid']} of {len(cases[::8])} valid calls were computed")
    return counts
