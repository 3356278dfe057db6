"""Writes the plugin's sources as one folder that CMake can build: C++, TensorRT's headers and the machine code."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from h1export.plugins.gpu.cubin import Cubin
from h1export.targets.tensorrt.plugin.schema import header

PLUGIN = Path(__file__).parent
DTYPES = {"fp16": "kHALF", "bf16": "kBF16"}  # Triton's name -> name in nvinfer1::DataType


def write_sources(folder: Path, cubins: Sequence[Cubin]) -> Path:
    """Write the sources into ``folder``, which must not exist, and return it; equal machine code gives equal bytes."""
    shutil.copytree(PLUGIN / "csrc", folder)
    shutil.copytree(PLUGIN / "include", folder / "include")
    (folder / "code").mkdir()
    for index, cubin in enumerate(cubins):
        (folder / "code" / f"{index}.cubin").write_bytes(cubin.code)
    (folder / "ops.h").write_text(header(), encoding="utf-8")
    (folder / "code.S").write_text(_assembly(len(cubins)), encoding="utf-8")
    (folder / "generated.cc").write_text(_table(cubins, digest(cubins)), encoding="utf-8")
    return folder


def digest(cubins: Sequence[Cubin], *more: str) -> str:
    """Return a key of everything that the library is made of, and of the texts ``more``: 32 hex digits of a sha256."""
    total = hashlib.sha256("\0".join((header(), _table(cubins, ""), *more)).encode())
    for file in sorted([*(PLUGIN / "csrc").rglob("*"), *(PLUGIN / "include").rglob("*")]):
        if file.is_file():
            total.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    for cubin in cubins:
        total.update(hashlib.sha256(cubin.code).digest())
    return total.hexdigest()[:32]


def _assembly(count: int) -> str:
    """Return the assembly file that gives each of the ``count`` files of machine code a symbol."""
    lines = ['.section .rodata, "a"']
    for index in range(count):
        lines += [
            ".balign 64",
            f".global h1_code_{index}",
            f".hidden h1_code_{index}",
            f"h1_code_{index}:",
            f'.incbin "code/{index}.cubin"',
        ]
    return "\n".join([*lines, '.section .note.GNU-stack, "", %progbits', ""])


def _table(cubins: Sequence[Cubin], name: str) -> str:
    """Return the C++ file with the table of the machine code; ``name`` identifies the library."""
    lines = ["// Generated: what code/ holds.", '#include "cubins.h"', "", 'extern "C" {']
    lines += [f"extern unsigned char const h1_code_{index}[];" for index in range(len(cubins))]
    lines += ["}", "", "namespace h1 {", "", f'char const kLibrary[] = "{name}";', "", "Cubin const kCubins[] = {"]
    for index, cubin in enumerate(cubins):
        kernel = cubin.kernel
        constants = ", ".join(f'{{"{constant}", {value}}}' for constant, value in kernel.constants)
        dtype = f"nvinfer1::DataType::{DTYPES[kernel.dtype]}"
        what = f'"{kernel.name}", {dtype}, {cubin.architecture}, {kernel.threads}, {cubin.shared}'
        lines.append(f'    {{{what}, "{cubin.entry}", h1_code_{index}, {{{constants}, {{nullptr, 0}}}}}},')
    return "\n".join([*lines, "};", f"int32_t const kCubinCount = {len(cubins)};", "", "}  // namespace h1", ""])
