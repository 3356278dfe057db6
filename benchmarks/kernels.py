"""Time QMatMul against ONNX Runtime's MatMulNBits at accuracy level 4, on the same weights, at the 0.5B shape.

    python benchmarks/kernels.py --threads 2 --rounds 15

Both run in one process, in turns, each as one graph of many nodes with different weights, so that caches hold no more
of them than in a model; the bandwidth to compare with is read in the same rounds. Medians are printed: GB/s of codes
and scales, and GFLOP/s. Quote figures of an idle machine only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

from h1export.targets.onnxruntime.native_library import library

SHAPES = (
    (4120, 1024),
    (1024, 2048),
    (4096, 1024),
    (32784, 1024),
)  # [in_proj | q | k | v], [out | o] and down, gate | up, head
WORKING_SET = 1 << 27  # bytes of weights in a graph: several times a last-level cache
READ_BYTES = 1 << 27


@dataclass(frozen=True)
class Product:
    """An op with its domain and the dtype of its scales."""

    name: str
    domain: str
    scale: type[np.floating]

    def weight_bytes(self, rows: int, columns: int, bits: int, *, group_size: int) -> int:
        """Bytes of the codes and scales of one weight."""
        return rows * (columns * bits // 8 + columns // group_size * np.dtype(self.scale).itemsize)


STOCK = Product("MatMulNBits", "com.microsoft", np.float32)
NATIVE = Product("QMatMul", "h1export", np.float16)


def graph(op: Product, rows: int, columns: int, *, bits: int, group_size: int, count: int) -> bytes:
    """``count`` nodes that multiply x [tokens, columns] by different random weights [rows, columns]."""
    rng = np.random.default_rng(0)
    scale_type = helper.np_dtype_to_tensor_dtype(np.dtype(op.scale))
    nodes = []
    constants = []
    for i in range(count):
        codes = rng.integers(0, 256, rows * columns * bits // 8, np.uint8)
        scales = rng.uniform(0.5, 1.5, rows * columns // group_size).astype(op.scale)
        constants += [
            helper.make_tensor(
                f"codes{i}",
                TensorProto.UINT8,
                (rows, columns // group_size, group_size * bits // 8),
                codes.tobytes(),
                raw=True,
            ),
            helper.make_tensor(f"scales{i}", scale_type, (rows, columns // group_size), scales.tobytes(), raw=True),
        ]
        attributes = {"K": columns, "N": rows, "bits": bits, "block_size": group_size, "accuracy_level": 4}
        nodes.append(
            helper.make_node(op.name, ["x", f"codes{i}", f"scales{i}"], [f"y{i}"], domain=op.domain, **attributes)
        )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ("tokens", columns))
    results = [helper.make_tensor_value_info(f"y{count - 1}", TensorProto.FLOAT, None)]
    results += [
        helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(count - 1)
    ]  # or a node would be dropped
    made = helper.make_graph(nodes, op.name, [x], results, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(op.domain, 1)]
    return bytes(helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString())


def timed(
    op: Product, x: np.ndarray, rows: int, *, bits: int, group_size: int, count: int, threads: int
) -> Callable[[], float]:
    """A function that runs the graph once and returns seconds per node."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library()))
    options.add_session_config_entry(
        "session.force_spinning_stop", "1"
    )  # or one session's threads take time from the other's
    session = ort.InferenceSession(
        graph(op, rows, x.shape[1], bits=bits, group_size=group_size, count=count),
        options,
        providers=["CPUExecutionProvider"],
    )
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    for output in session.get_outputs():
        binding.bind_ortvalue_output(
            output.name, ort.OrtValue.ortvalue_from_numpy(np.zeros((len(x), rows), np.float32))
        )

    def run() -> float:
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        return (time.perf_counter() - start) / count

    run()  # the first call allocates, and MatMulNBits packs
    return run


def reading(threads: int) -> Callable[[], float]:
    """A function that reads an array once, each thread its part, and returns seconds per byte."""
    parts = np.array_split(np.ones(READ_BYTES // 4, np.uint32), threads)
    pool = ThreadPoolExecutor(threads)

    def run() -> float:
        start = time.perf_counter()
        list(pool.map(np.max, parts))
        return (time.perf_counter() - start) / READ_BYTES

    return run


def measure(table: Table, rows: int, columns: int, *, tokens: int, args: argparse.Namespace) -> None:
    """Add one line to the table."""
    sizes = [op.weight_bytes(rows, columns, args.bits, group_size=args.group_size) for op in (STOCK, NATIVE)]
    count = max(1, (WORKING_SET if tokens == 1 else WORKING_SET // 8) // max(sizes))
    x = np.random.default_rng(1).standard_normal((tokens, columns)).astype(np.float32)
    runs = [
        timed(op, x, rows, bits=args.bits, group_size=args.group_size, count=count, threads=args.threads)
        for op in (STOCK, NATIVE)
    ] + [reading(args.threads)]
    rounds = [[run() for run in runs] for _ in range(args.rounds)]
    stock, native, byte = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(row[0] / row[1] for row in rounds)
    share = statistics.median(sizes[1] * row[2] / row[1] for row in rounds)
    figures = [
        f"{1e6 * seconds:.0f} us, {size / seconds / 1e9:.1f}, {2 * rows * columns * tokens / seconds / 1e9:.0f}"
        for size, seconds in zip(sizes, (stock, native), strict=True)
    ]
    best = [f"{2 * rows * columns * tokens / min(column) / 1e9:.0f}" for column in list(zip(*rounds, strict=True))[:2]]
    table.add_row(
        f"{rows} x {columns}",
        str(tokens),
        *figures,
        " / ".join(best),
        f"{ratio:.2f}",
        f"{1e-9 / byte:.1f}",
        f"{share:.2f}",
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bits", type=int, choices=[4, 8], default=4)
    parser.add_argument("--group-size", type=int, choices=[16, 32, 64, 128], default=32)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512])
    args = parser.parse_args()
    table = Table(
        title=f"int{args.bits}, groups of {args.group_size}, {args.threads} threads, medians of {args.rounds} rounds"
    )
    for heading in (
        "weight",
        "tokens",
        "MatMulNBits: time, GB/s, GFLOP/s",
        "QMatMul",
        "best GFLOP/s",
        "stock / native",
        "read GB/s",
        "share",
    ):
        table.add_column(heading, justify="right")
    for tokens in args.tokens:
        for rows, columns in SHAPES:
            measure(table, rows, columns, tokens=tokens, args=args)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
