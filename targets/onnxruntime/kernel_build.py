"""How the CPU kernels are compiled: for this machine, or, for a wheel, once for each level of instructions.

Only the standard library is imported here, because setup.py loads this file by its path, where h1export is not
installed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = tuple(sorted((FOLDER / "csrc").glob("*.cc")))
HEADERS = tuple(sorted([*(FOLDER / "csrc").glob("*.h"), *(FOLDER / "include").glob("*.h")]))
STEM = "libh1export_ort"
PACKAGED = FOLDER / "kernels"  # the folder of a wheel's libraries
COMPILERS = ("c++", "g++", "clang++")  # in this order, where $CXX is not set
FLAGS = (
    "-std=c++20",
    "-O3",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-Wno-psabi",  # vectors that a CPU has not are passed in another way, but within the library only
    f"-I{FOLDER / 'include'}",
)
# a wheel's libraries load with the glibc that onnxruntime's wheels ask for, 2.28, whatever this machine has
WHEEL_FLAGS = ("-s", "-include", f"{FOLDER / 'csrc' / 'old_glibc.h'}")


@dataclass(frozen=True)
class Level:
    """A set of instructions that one library of a wheel may use.

    Attributes:
        name: what its file is called after.
        flags: what the compiler is told.
        features: what the CPU must have, by the names in Linux's /proc/cpuinfo.
    """

    name: str
    flags: tuple[str, ...]
    features: frozenset[str]


# GCC's tuning for Zen 3 adds products to sums in two steps; on a Zen 4 it is as fast as what is compiled there, whose
# results it gives bit for bit, and the generic tuning is neither
TUNED = "-mtune=znver3"
# The x86-64 psABI defines the levels v3 and v4; Linux names lzcnt "abm", and sse3 "pni". All of v2 comes with avx2.
V3 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe", "popcnt", "cx16", "lahf_lm", "ssse3", "sse4_2"})
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
VNNI = ("-march=x86-64-v4", "-mavx512vnni")
# what Armv8.2 asks for beyond Armv8 that compilers use, and the dot product, which it leaves open
ARMV8_2 = frozenset({"crc32", "atomics", "asimdrdm", "asimddp"})
# machine, as os.uname() has it -> its levels, the best first; the last one runs on every such CPU
LEVELS = {
    "x86_64": (
        Level("amx", (*VNNI, "-mamx-tile", "-mamx-int8", TUNED), V4 | {"avx512_vnni", "amx_tile", "amx_int8"}),
        Level("avx512-vnni", (*VNNI, TUNED), V4 | {"avx512_vnni"}),
        Level("avx-vnni", ("-march=x86-64-v3", "-mavxvnni", TUNED), V3 | {"avx_vnni"}),
        Level("avx2", ("-march=x86-64-v3", TUNED), V3),
        Level("sse2", ("-march=x86-64",), frozenset()),
    ),
    "aarch64": (
        Level("i8mm", ("-march=armv8.2-a+dotprod+i8mm",), ARMV8_2 | {"i8mm"}),
        Level("dotprod", ("-march=armv8.2-a+dotprod",), ARMV8_2),
        Level("neon", ("-march=armv8-a",), frozenset()),
    ),
}


def for_this_machine(machine: str) -> tuple[str, ...]:
    """Return the flags that let the compiler use all that the CPU at hand has."""
    return ("-mcpu=native",) if machine in ("aarch64", "arm64") else ("-march=native",)


def command(compiler: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Return the words of a compiler that makes the library; sources and the output are still to be added."""
    return [*compiler, *FLAGS, *flags]


def sources_digest(sources: Sequence[Path] = SOURCES, headers: Sequence[Path] = HEADERS) -> bytes:
    """Return a SHA-256 of the names and bytes of the files that are compiled."""
    digest = hashlib.sha256()
    for file in (*sources, *headers):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.digest()


def file_name(level: Level) -> str:
    """Return the name of a level's library in a wheel; sources or flags of another version have other names."""
    words = "\0".join((*FLAGS, *WHEEL_FLAGS, *level.flags)).replace(str(FOLDER), "")
    digest = hashlib.sha256(words.encode() + sources_digest())
    return f"{STEM}-{level.name}-{digest.hexdigest()[:16]}.so"


def levels_of(machine: str, features: frozenset[str]) -> tuple[Level, ...]:
    """Return the levels that a CPU with these features has, the best first; none for a machine that LEVELS lacks."""
    return tuple(level for level in LEVELS.get(machine, ()) if level.features <= features)


def cpu_features(cpuinfo: str) -> frozenset[str]:
    """Return the features of the first CPU of a /proc/cpuinfo; the operating system uses all that it lists."""
    for line in cpuinfo.splitlines():
        name, _, words = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(words.split())
    return frozenset()
