"""Whole artifacts whose graph over our kernels was changed: each must end in one line, or in logits of the right shape.

Run it as a program, ``python -m sanitize.artifacts ARTIFACT COUNT SEED [LIBRARY]``, with the address sanitizer loaded
before Python and LIBRARY compiled with it; the exit code is 0 where that held COUNT times.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
from onnx import TensorProto

from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import MANIFEST
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.targets.onnxruntime import native_library
from h1export.targets.onnxruntime.inference_session import NATIVE_MODEL

DOMAIN = "h1export"
TOKENS = (1, 3, 17)
LONGEST = 400  # characters of an error
INTEGERS = (0, -1, 1, 2, 8, 65536, 65537, 2**31 - 1, 2**31, 2**32, 2**61, 2**62, 2**63 - 1, 2**63 - 64, -(2**63))
REALS = (float("nan"), float("inf"), float("-inf"), 0.0, -1.0, 1e38)


def mutate(model: onnx.ModelProto, rng: random.Random) -> str:
    """Change one thing of a node of ours, or of an initializer that one reads, and return what."""
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    node = rng.choice(nodes)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = [name for name in node.input if name in tensors]
    kind = rng.choice(["attribute"] * 4 + ["inputs", "shape", "shape", "offset", "dtype", "outputs"])
    if kind == "attribute" and node.attribute:
        attribute = rng.choice(node.attribute)
        if rng.randrange(12) == 0:
            node.attribute.remove(attribute)
        elif attribute.type == onnx.AttributeProto.FLOAT:
            attribute.f = rng.choice(REALS)
        else:
            near = max(-(2**63), min(2**63 - 1, attribute.i + rng.choice((-8, -1, 1, 8, attribute.i))))
            attribute.i = rng.choice((*INTEGERS, near))
    elif kind == "inputs":
        at, other = rng.randrange(len(node.input)), rng.choice(nodes)
        node.input[at] = rng.choice(["", *node.input, *other.input])
    elif kind == "outputs" and len(node.output) > 1:
        node.output[rng.randrange(len(node.output))] = "nobody_reads_this"
    elif weights and kind in ("shape", "offset", "dtype"):
        _mutate_weight(tensors[rng.choice(weights)], kind, rng)
    return f"{node.op_type}: {kind}"


def _mutate_weight(tensor: TensorProto, kind: str, rng: random.Random) -> None:
    sizes = list(tensor.dims)
    if kind == "dtype":
        tensor.data_type = rng.choice((TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8, TensorProto.INT64))
    elif kind == "offset":
        for entry in tensor.external_data:
            if entry.key == "offset":
                entry.value = str(int(entry.value) + rng.choice((1, 2, 4, 3, 4096)))
    else:
        match rng.randrange(4):
            case 0:
                sizes = [int(np.prod(sizes))]
            case 1:
                sizes = []
            case 2:
                sizes.insert(rng.randrange(len(sizes) + 1), rng.choice((0, 1)))
            case _:
                at = rng.randrange(len(sizes))
                sizes[at] = max(0, sizes[at] + rng.choice((-1, 1, -sizes[at], 2**31)))
        del tensor.dims[:]
        tensor.dims.extend(sizes)


def write(source: Path, folder: Path, model: onnx.ModelProto) -> None:
    """Write the artifact with another graph over our kernels, and a manifest that agrees with it."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    data = model.SerializeToString()
    (folder / NATIVE_MODEL).unlink()
    (folder / NATIVE_MODEL).write_bytes(data)
    manifest = json.loads((source / MANIFEST).read_text("utf-8"))
    manifest["files"][NATIVE_MODEL] = [hashlib.sha256(data).hexdigest(), len(data)]
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")


def use(folder: Path) -> str:
    """Load the artifact over our kernels and compute a few calls; return "right" or "refused".

    Raises:
        AssertionError: The error is no single short line, or the logits have another shape.
    """
    try:
        artifact = Artifact.open(folder)
        runner = load_runner(artifact, kernels="native", threads=2)
        session = runner.start(2, sum(TOKENS))
        for tokens in TOKENS:
            logits = session.append(np.ones((2, tokens), np.int64))
            assert logits.shape[0] == 2, logits.shape
            assert logits.shape[-1] == artifact.config.vocab_size, logits.shape
    except H1ExportError as error:
        line = str(error)
    else:
        return "right"
    assert "\n" not in line, line
    assert len(line) <= LONGEST, line
    return "refused"


def main(words: list[str]) -> int:
    """Mutate and use an artifact; see the top of this file."""
    source, count, seed = Path(words[0]), int(words[1]), int(words[2])
    folder = source.with_name(f"{source.name}.mutated")
    clean = onnx.load(source / NATIVE_MODEL, load_external_data=False)
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    library = Path(words[3]) if words[3:] else native_library.library()
    with mock.patch.object(native_library, "library", return_value=library):
        assert use(source) == "right"
        for _ in range(count):
            model = onnx.ModelProto()
            model.CopyFrom(clean)
            what = [mutate(model, rng) for _ in range(rng.randrange(1, 3))]
            print("next:", *what, file=sys.stderr, flush=True)
            write(source, folder, model)
            counts[use(folder)] += 1
    shutil.rmtree(folder)
    print(*(f"{name} {number}" for name, number in sorted(counts.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
