"""Compile the GPU kernels for every architecture, check the limits, and write the tables of docs/kernels.md.

    python tools/kernel_tables.py [--jobs 2] [--check]

The script needs Triton (the extra trt) and no GPU; about 500 kernels take some minutes. ``--check`` writes nothing and
fails if the file differs.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from roofline import GPUS, PUBLISHED, Gpu, Shape, Work, conv_work, scan_work

from h1export.errors import H1ExportError
from h1export.plugins.causal_conv import launch as conv
from h1export.plugins.gpu.cubin import ARCHITECTURES, Cubin, check_limits, compile_kernel
from h1export.plugins.gpu.kernel import Kernel
from h1export.plugins.ssm_scan.launch import kernels
from h1export.plugins.ssm_scan.tiles import TILES

DOCUMENT = Path(__file__).parents[1] / "docs" / "kernels.md"
DTYPES = ("fp16", "bf16")
PROMPT = 2048  # tokens of the estimates of prefill
CHUNKS = (64, 128, 256, 512)


def all_kernels() -> list[Kernel]:
    """Return the kernels of the scan for every row of tiles.py, and those of the convolution."""
    scans = [kernel for sizes in TILES for dtype in DTYPES for kernel in kernels(*sizes, dtype)]
    return scans + [
        conv.kernel(dtype, PUBLISHED[0].taps, True, one_token=one_token)
        for dtype in DTYPES
        for one_token in (True, False)
    ]


def compile_checked(kernel_and_architecture: tuple[Kernel, int]) -> Cubin | str:
    """Return the compiled kernel, or the error message if it does not compile or exceeds a limit."""
    try:
        cubin = compile_kernel(*kernel_and_architecture)
        check_limits(cubin)
    except H1ExportError as error:
        return str(error)
    return cubin


def resource_rows(cubins: list[Cubin]) -> Iterator[str]:
    """Yield the table of the resources of each kernel and tile, one column per architecture.

    A cell has registers, spilled bytes and KiB of shared memory, each the larger of both dtypes.
    """
    rows: dict[str, dict[int, list[Cubin]]] = defaultdict(lambda: defaultdict(list))
    for cubin in cubins:
        constants = dict(cubin.kernel.constants)
        sizes = f"{constants['P']} x {constants['N']}" if "P" in constants else "any"
        tile = " ".join(
            f"{name} {constants[name]}" for name in ("Q", "BT", "BP", "BN", "BS", "BC") if name in constants
        )
        rows[f"| {cubin.kernel.name} | {sizes} | {tile} | {cubin.kernel.warps} |"][cubin.architecture].append(cubin)
    yield (
        "| kernel | head dim x state | tile | warps | "
        + " | ".join(f"sm_{number}{'a' if number >= 90 else ''}" for number in ARCHITECTURES)
        + " |"
    )
    yield "|---" * (4 + len(ARCHITECTURES)) + "|"
    for label in sorted(rows):
        yield label + "".join(f" {cell(rows[label][number])} |" for number in ARCHITECTURES)


def cell(cubins: list[Cubin]) -> str:
    """Return "registers/spilled bytes/KiB of shared memory"."""
    registers, spilled, shared = (
        max(getattr(cubin, name) for cubin in cubins) for name in ("registers", "spilled", "shared")
    )
    return f"{registers}/{spilled}/{-(-shared // 1024)}"


def layer_time(shape: Shape, gpu: Gpu, batch: int, *, tokens: int) -> str:
    """Return the microseconds of one layer's scan and convolution, and the first letter of the longest one's bound."""
    works = [
        *scan_work(shape.problem(batch, tokens)).values(),
        conv_work(batch, tokens, shape.channels, taps=shape.taps),
    ]
    longest = max(works, key=lambda work: work.seconds(gpu))
    return f"{sum(work.seconds(gpu) for work in works) * 1e6:.3g} {longest.bound(gpu)[0]}"


def estimates(batch: int, tokens: int) -> Iterator[str]:
    """Yield the table of the estimated time of one layer, one row per model and one column per GPU."""
    yield "| µs a layer | " + " | ".join(gpu.name for gpu in GPUS) + " |"
    yield "|---" * (1 + len(GPUS)) + "|"
    for shape in PUBLISHED:
        yield f"| {shape.model} |" + "".join(f" {layer_time(shape, gpu, batch, tokens=tokens)} |" for gpu in GPUS)


def per_kernel() -> Iterator[str]:
    """Yield the table of each kernel's bytes and operations, and its estimated time and bound on each GPU."""
    yield "| model | kernel | MB | Gflop | " + " | ".join(gpu.name for gpu in GPUS) + " |"
    yield "|---" * (4 + len(GPUS)) + "|"
    for shape in PUBLISHED:
        works: dict[str, Work] = {}
        for tokens in (PROMPT, 1):
            works |= scan_work(shape.problem(1, tokens))
            works[f"causal_conv, {tokens}"] = conv_work(1, tokens, shape.channels, taps=shape.taps)
        for name, work in works.items():
            times = " | ".join(f"{work.seconds(gpu) * 1e6:.3g} {work.bound(gpu)[0]}" for gpu in GPUS)
            yield f"| {shape.model} | {name} | {work.bytes / 1e6:.3g} | {work.operations / 1e9:.3g} | {times} |"


def chunks() -> Iterator[str]:
    """Yield the table of the estimates of the scan for each chunk on each GPU; the choice of tiles.py is in bold."""
    yield (
        f"| head dim x state, chunks of {', '.join(map(str, CHUNKS))} | " + " | ".join(gpu.name for gpu in GPUS) + " |"
    )
    yield "|---" * (1 + len(GPUS)) + "|"
    for shape in {(s.d_head, s.d_state): s for s in PUBLISHED}.values():
        sizes = (shape.d_head, shape.d_state)
        problem = shape.problem(1, PROMPT)
        chosen = TILES[sizes]
        times: dict[int, list[float]] = {}
        for chunk in CHUNKS:
            TILES[sizes] = chosen._replace(chunk=chunk)
            times[chunk] = [sum(work.seconds(gpu) for work in scan_work(problem).values()) * 1e6 for gpu in GPUS]
        TILES[sizes] = chosen
        texts = [
            [f"**{times[c][i]:.3g}**" if c == chosen.chunk else f"{times[c][i]:.3g}" for c in CHUNKS]
            for i in range(len(GPUS))
        ]
        yield f"| {shape.d_head} x {shape.d_state} | " + " | ".join(" ".join(text) for text in texts) + " |"


def with_tables(text: str, tables: dict[str, list[str]]) -> str:
    """Return the document with each table replaced; "<!-- NAME -->" and "<!-- end -->" enclose the table NAME."""
    for name, lines in tables.items():
        start = f"<!-- {name} -->\n"
        end = "<!-- end -->"
        before, _, rest = text.partition(start)
        after = rest[rest.index(end) :]
        text = before + start + "\n".join(lines) + "\n" + after
    return text


def main() -> None:
    """Write the document, or print what is wrong and exit with code 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    pairs = [(kernel, architecture) for kernel in all_kernels() for architecture in ARCHITECTURES]
    with ProcessPoolExecutor(options.jobs) as pool:
        results = list(pool.map(compile_checked, pairs))
    if errors := [result for result in results if isinstance(result, str)]:
        sys.exit("\n".join(errors))
    cubins = [result for result in results if isinstance(result, Cubin)]
    tables = {
        "compiled": list(resource_rows(cubins)),
        "decode": list(estimates(1, 1)),
        "prefill": list(estimates(1, PROMPT)),
        "kernels": list(per_kernel()),
        "chunks": list(chunks()),
    }
    text = DOCUMENT.read_text(encoding="utf-8")
    new = with_tables(text, tables)
    if options.check and new != text:
        sys.exit(f"{DOCUMENT.name} differs from the tables of the current kernels: run this without --check")
    DOCUMENT.write_text(new, encoding="utf-8")
    spilled = [cubin.spilled for cubin in cubins]
    print(f"{len(cubins)} kernels, {sum(count > 0 for count in spilled)} of them spill, at most {max(spilled)} bytes")


if __name__ == "__main__":
    main()
