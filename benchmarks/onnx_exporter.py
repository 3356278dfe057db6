"""transformers' own OnnxExporter as a peer: the cost of an export, and the speed of its two graphs in ONNX Runtime.

    python benchmarks/onnx_exporter.py /path/to/checkpoint OUT

exports, and no more. The export is in float32, with dynamic shapes, from a prompt of more than one scan chunk.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from h1export.report.checks import Phase
from h1export.runtime.runner import Limits, Provenance
from h1export.validate.speed.worker import Timing

PROMPT = 160  # tokens of the traced prompt
START = 8  # tokens before a decode timing at depth 0: the decode graph takes a past only
VOCABULARY = 256  # token ids below it; time does not depend on them


def export(checkpoint: Path, out: Path) -> None:
    """Write the prefill and decode graphs of ``checkpoint`` to ``out``."""
    from transformers import FalconH1ForCausalLM
    from transformers.exporters import OnnxConfig, OnnxExporter

    model: Any = FalconH1ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    OnnxExporter().export_for_generation(model, inputs, OnnxConfig(dynamic=True)).save_pretrained(out)


class Exported:
    """A Model of validate/speed/worker.py over the graphs that ``export`` wrote.

    A past is filled with random values, not computed, as in eager.Eager.
    """

    def __init__(self, folder: Path, threads: int, steps: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._prefill, self._decode = (
            ort.InferenceSession(folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
            for name in ("prefill", "decode")
        )
        self._steps = steps
        self.limits = Limits()
        self.provenance = Provenance(kernels=f"onnxruntime {ort.__version__}")

    def speed(self, timing: Timing) -> float:
        """Tokens per second."""
        if timing.phase is Phase.PREFILL:
            start = time.perf_counter()
            self._run(self._prefill, {}, 0, tokens=timing.tokens)
            return timing.tokens / (time.perf_counter() - start)
        states = self._run(self._prefill, {}, 0, tokens=START)
        depth = max(START, timing.tokens)
        for name in [name for name in states if name.endswith((".keys", ".values"))]:
            batch, heads, _, dim = states[name].shape
            states[name] = np.random.default_rng(0).standard_normal((batch, heads, depth, dim), np.float32)
        start = time.perf_counter()
        for position in range(depth, depth + self._steps):
            states = self._run(self._decode, states, position, tokens=1)
        return self._steps / (time.perf_counter() - start)

    def _run(self, session: Any, states: Mapping[str, Any], position: int, *, tokens: int) -> dict[str, Any]:
        """The states after ``tokens`` random tokens, by their names without input. and output."""
        ids = np.random.default_rng(0).integers(0, VOCABULARY, (1, tokens))
        inputs = {"input_ids": ids, "position_ids": np.arange(position, position + tokens)[None]}
        feeds = {value.name: (inputs | states)[value.name.removeprefix("input.")] for value in session.get_inputs()}
        names = [value.name for value in session.get_outputs()]
        found = dict(zip(names, session.run(names, feeds), strict=True))
        return {name.removeprefix("output."): array for name, array in found.items() if name != "logits"}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    export(args.checkpoint, args.out)


if __name__ == "__main__":
    main()
