"""Where the system refuses AMX's tiles, products are those of vectors, bit for bit.

On a CPU without AMX both are vectors; that the request is refused is checked anywhere.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from h1export.targets.onnxruntime.emit.packing import NBitsLayout

TOKENS, ROWS = 45, 70  # groups and panels with a last one that is not whole

# Linux answers "no" to arch_prctl(ARCH_REQ_XCOMP_PERM, ...), by a filter of system calls, and the case is computed.
REFUSED = """
import ctypes, struct, sys
import numpy as np

LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ARCH_PRCTL, REQUEST, ALLOW, DENY = 158, 0x1023, 0x7FFF0000, 0x00050001
steps = [(LOAD, 0, 0, 0), (EQUAL, 0, 3, ARCH_PRCTL), (LOAD, 0, 0, 16), (EQUAL, 0, 1, REQUEST), (RETURN, 0, 0, DENY),
         (RETURN, 0, 0, ALLOW)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
libc = ctypes.CDLL(None, use_errno=True)
program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program, 0, 0) == 0
assert libc.syscall(ARCH_PRCTL, REQUEST, 18) == -1 and ctypes.get_errno() == 1

import onnxruntime
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(sys.argv[1])
session = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
(y,) = session.run(None, {"x": np.load(sys.argv[3])})
np.save(sys.argv[4], y)
"""


def product(path: Path, bits: int, block: int) -> dict[str, np.ndarray[Any, Any]]:
    """Write a model of one QMatMul, and return what to feed."""
    rng = np.random.default_rng(bits + block)
    layout = NBitsLayout(bits, block, 3 * block + 5)
    zero = layout.zero_point
    weights = {
        "codes": layout.pack(rng.integers(-zero, zero, (ROWS, layout.columns)).astype(np.int8)),
        "scales": rng.uniform(0.01, 0.1, (ROWS, layout.blocks)).astype(np.float16),
    }
    node = helper.make_node(
        "QMatMul",
        ["x", *weights],
        ["y"],
        domain="h1export",
        K=layout.columns,
        N=ROWS,
        bits=bits,
        block_size=block,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [TOKENS, layout.columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("h1export", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return {"x": rng.standard_normal((TOKENS, layout.columns)).astype(np.float32)}


if platform.machine() in ("x86_64", "AMD64") and sys.platform == "linux":

    @pytest.mark.parametrize(("bits", "block"), [(4, 32), (8, 16), (4, 128)])
    def test_without_permission_vectors_compute_the_same_bits(
        native_library: str, bits: int, block: int, tmp_path: Path
    ) -> None:
        model, x, y = (tmp_path / name for name in ("model.onnx", "x.npy", "y.npy"))
        fed = product(model, bits, block)
        np.save(x, fed["x"])
        subprocess.run([sys.executable, "-c", REFUSED, native_library, model, x, y], check=True)
        options = ort.SessionOptions()
        options.register_custom_ops_library(native_library)
        (expected,) = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, fed)
        np.testing.assert_array_equal(np.load(y), expected)
