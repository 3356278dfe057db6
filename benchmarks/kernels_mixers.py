"""Time the native CausalConv, SSMScan and Attention against ONNX Runtime's own ops, at the shape of Falcon-H1-0.5B.

    python benchmarks/kernels_mixers.py --threads 2 --rounds 15

Each formulation is a small graph that reads its columns of one projection's output, as in an artifact; states are bound
in place. A round runs every formulation once over LAYERS sets of inputs and states, so that caches hold no more of them
than in a model; the table has the median over rounds of microseconds per layer. Quote figures of an idle machine only.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx.parser
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

from h1export.targets.onnxruntime import int8_rows
from h1export.targets.onnxruntime.native_library import library

LAYERS = 36
# [z 1536 | x B C 1792 | dt 24 | q 512 | k 128 | v 128]
WIDTH = 4120
HEADS = 24
P = 64
N = 128
CHANNELS = 1792
HEAD = '<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1, "h1export": 1]> g (float[1,t,4120] row, '
STOCK = "stock"
NATIVE = "native"
HALVES = "native, fp16 cache"
CODES = "native, int8 cache"

CONV = {
    STOCK: """float[1,3,1792] state, float[1792] w0, float[1792] w1, float[1792] w2, float[1792] w3,
     float[1792] bias) => (y, new)
    <int64[1] a = {1536}, int64[1] b = {3328}, int64[1] two = {2}, int64[1] one = {1}, int64[1] i0 = {0},
     int64[1] i1 = {1}, int64[1] i2 = {2}, int64[1] i3 = {3}, int64[1] e0 = {-3}, int64[1] e1 = {-2},
     int64[1] e2 = {-1}, int64[1] e3 = {9999999}> {
        x = Slice(row, a, b, two)
        all = Concat<axis = 1>(state, x)
        s0 = Slice(all, i0, e0, one)  s1 = Slice(all, i1, e1, one)
        s2 = Slice(all, i2, e2, one)  s3 = Slice(all, i3, e3, one)
        p0 = Mul(s0, w0)  p1 = Mul(s1, w1)  p2 = Mul(s2, w2)  p3 = Mul(s3, w3)
        t0 = Add(bias, p0)  t1 = Add(t0, p1)  t2 = Add(t1, p2)  t3 = Add(t2, p3)
        y = com.microsoft.QuickGelu<alpha = 1.0>(t3)
        new = Slice(all, e0, e3, one)
    }""",
    NATIVE: """float[1,3,1792] state, float[4,1792] w, float[1792] bias, float[1,t] mask) => (y, new) {
        y, new = h1export.CausalConv<offset = 1536>(row, state, w, bias, mask)
    }""",
}
SCAN = {
    STOCK: """float[1,t,1792] xbc, float[24] A, float[24] D, float[24] dt_bias, float[1,24,128,64] state,
     float[1,t] mask) => (y, new)
    <int64[1] zero = {0}, int64[1] a = {1536}, int64[1] b = {3328}, int64[1] c = {3352}, int64[1] two = {2},
     int64[1] three = {3}, int64[1] one = {1}, int64[3] parts = {1536, 128, 128}, int64[3] flat = {0, 0, -1},
     int64[4] split = {0, 0, 24, 64}> {
        gate = Slice(row, zero, a, two)  raw = Slice(row, b, c, two)
        x, B, C = Split<axis = 2>(xbc, parts)
        biased = Add(raw, dt_bias)  soft = Softplus(biased)  column = Unsqueeze(mask, two)  step = Mul(soft, column)
        heads = Reshape(x, split)  steps = Unsqueeze(step, three)  drive4 = Mul(heads, steps)
        drive = Reshape(drive4, flat)
        decay = Mul(step, A)
        s, new = com.microsoft.LinearAttention<q_num_heads = 1, kv_num_heads = 24, update_rule = "gated", scale = 1.0>(
            C, B, drive, state, decay)
        skips = Unsqueeze(D, one)  skip4 = Mul(heads, skips)  skip = Reshape(skip4, flat)
        sum = Add(s, skip)  weight = com.microsoft.QuickGelu<alpha = 1.0>(gate)  y = Mul(sum, weight)
    }""",
    NATIVE: """float[1,t,1792] xbc, float[24] A, float[24] D, float[24] dt_bias, float[1,24,128,64] state,
     float[1,t] mask) => (y, new) {
        y, new = h1export.SSMScan<heads = 24, groups = 1, d_head = 64, d_state = 128, dt_offset = 3328,
            gate_offset = 0, dt_min = 0.0,
                                  dt_max = 3e38>(xbc, row, A, D, dt_bias, state, mask, row)
    }""",
}
CACHE = "float[1,2,p,64] keys, float[1,2,p,64] values"
ATTENTION = {
    STOCK: f"""float[1,t,32] cos, float[1,t,32] sin, float[1,1,t,n] bias, int32[1] last, int32 total,
     {CACHE}) => (y, new_keys, new_values)
    <int64[4] parts = {{3352, 512, 128, 128}}> {{
        front, q, k, v = Split<axis = 2>(row, parts)
        rq = RotaryEmbedding<num_heads = 8>(q, cos, sin)  rk = RotaryEmbedding<num_heads = 2>(k, cos, sin)
        y, new_keys, new_values = com.microsoft.GroupQueryAttention<num_heads = 8, kv_num_heads = 2, scale = 0.125>(
            rq, rk, v, keys, values, last, total, , , , bias)
    }}""",
    NATIVE: f"""float[1,t,32] cos, float[1,t,32] sin, int64[1,n] ones, {CACHE}) => (y, new_keys, new_values) {{
        y, new_keys, new_values = h1export.Attention<num_heads = 8, kv_heads = 2, head_dim = 64, q_offset = 3352,
            k_offset = 3864,
                                                     v_offset = 3992, scale = 0.125>(row, cos, sin, ones, keys, values)
    }}""",
}
for name, prefix, cache in ((HALVES, "half", "float16[1,2,p,64]"), (CODES, "int8", "int8[1,2,p,68]")):
    ATTENTION[name] = (
        ATTENTION[NATIVE]
        .replace("float[1,2,p,64]", cache)
        .replace("keys", f"{prefix}_keys")
        .replace("values", f"{prefix}_values")
    )
IN_PLACE = {"new": "state"}  # output -> the input whose memory it is
for prefix in ("", "half_", "int8_"):
    IN_PLACE |= {f"new_{prefix}{name}": f"{prefix}{name}" for name in ("keys", "values")}


@dataclass(frozen=True)
class Formulation:
    """A session whose inputs and outputs are bound once a layer."""

    session: Any
    bindings: list[Any]

    @classmethod
    def of(cls, text: str, layers: list[Mapping[str, Any]], threads: int) -> Formulation:
        """``layers`` has values by input name; those that the graph does not name are left out."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.register_custom_ops_library(str(library()))
        options.add_session_config_entry(
            "session.force_spinning_stop", "1"
        )  # or one session's threads take time from the other's
        model = onnx.parser.parse_model(HEAD + text).SerializeToString()
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        bindings = []
        for values in layers:
            binding = session.io_binding()
            for port in session.get_inputs():
                binding.bind_ortvalue_input(port.name, values[port.name])
            for port in session.get_outputs():
                if port.name in IN_PLACE:
                    binding.bind_ortvalue_output(port.name, values[IN_PLACE[port.name]])
                else:
                    binding.bind_output(port.name)
            bindings.append(binding)
        return cls(session, bindings)

    def seconds(self) -> float:
        """Return the seconds of one call on one layer's inputs."""
        start = time.perf_counter()
        for binding in self.bindings:
            self.session.run_with_iobinding(binding)
        return (time.perf_counter() - start) / len(self.bindings)


def aligned(array: Any) -> Any:
    """A copy in ONNX Runtime's own memory.

    NumPy's large arrays start 16 bytes into a cache line, so every second load would cross a line.
    """
    value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, "cpu")
    value.update_inplace(np.ascontiguousarray(array))
    return value


def layer(tokens: int, past: int, rng: np.random.Generator) -> Mapping[str, Any]:
    """Values of every input of one layer, for the stock and the native graphs."""
    total = past + tokens

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    angles = rng.uniform(0, 6, (1, tokens, 32))
    keys, values = (normal(1, 2, total, 64) for _ in range(2))
    w = normal(4, CHANNELS)
    return {
        "row": normal(1, tokens, WIDTH),
        "xbc": normal(1, tokens, CHANNELS),
        **{"w": w, "w0": w[0], "w1": w[1], "w2": w[2], "w3": w[3], "bias": normal(CHANNELS)},
        **{"A": -rng.uniform(1, 16, HEADS).astype(np.float32), "D": normal(HEADS), "dt_bias": normal(HEADS) - 4},
        "mask": np.ones((1, tokens), np.float32),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "ones": np.ones((1, total), np.int64),
        **{"last": np.array([total - 1], np.int32), "total": np.array(total, np.int32)},
        **{"keys": keys, "values": values},
        **{"half_keys": keys.astype(np.float16), "half_values": values.astype(np.float16)},
        **{"int8_keys": int8_rows.encode(keys), "int8_values": int8_rows.encode(values)},
    }


def rounds(
    texts: Mapping[str, str], state: tuple[int, ...], tokens: int, *, past: int, args: argparse.Namespace
) -> dict[str, float]:
    """Median microseconds per layer of each formulation."""
    rng = np.random.default_rng(0)
    count = max(2, min(LAYERS, 4 * LAYERS * 64 // (tokens + past)))
    one = layer(tokens, past, rng)
    formulations = {}
    for name, text in texts.items():
        layers = []
        for _ in range(count):
            values = {key: value.copy() for key, value in one.items()}
            values["state"] = np.zeros(state, np.float32)
            if "GroupQueryAttention" in text:
                values["bias"] = np.zeros((1, 1, tokens, past + tokens), np.float32)
            layers.append({key: aligned(value) for key, value in values.items()})
        formulations[name] = Formulation.of(text, layers, args.threads)
    times: dict[str, list[float]] = {name: [] for name in texts}
    for _ in range(args.rounds + 1):
        for name, formulation in formulations.items():
            times[name].append(formulation.seconds() * 1e6)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=["conv", "scan", "attention"])
    args = parser.parse_args()
    rows: list[tuple[str, Mapping[str, str], tuple[int, ...], int, int]] = []
    for tokens in (1, 512, 2048):
        rows += [("conv", CONV, (1, 3, CHANNELS), tokens, 0), ("scan", SCAN, (1, HEADS, N, P), tokens, 0)]
    for tokens, past in ((1, 127), (1, 2047), (1, 8191), (1, 32767), (512, 0), (2048, 0), (512, 1536)):
        rows.append(("attention", ATTENTION, (1,), tokens, past))
    table = Table(title=f"microseconds per layer, {args.threads} threads")
    for column in ("op", "tokens", "past", STOCK, NATIVE, "ratio", HALVES, CODES):
        table.add_column(column, justify="right")
    for op, texts, state, tokens, past in rows:
        if args.only in (None, op):
            result = rounds(texts, state, tokens, past=past, args=args)
            ratio = result[STOCK] / result[NATIVE] if result[NATIVE] else math.nan
            narrow = [f"{result[name]:.1f}" if name in result else "" for name in (HALVES, CODES)]
            times = (f"{result[STOCK]:.1f}", f"{result[NATIVE]:.1f}", f"{ratio:.2f}", *narrow)
            table.add_row(op, str(tokens), str(past), *times)
    Console().print(table)


if __name__ == "__main__":
    main()
