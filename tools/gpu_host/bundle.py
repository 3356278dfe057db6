"""Where things are in a joined bundle, and in the work folder of a run; the standard library only.

- tree/: tests, tools, benchmarks and pyproject.toml of the commit
- wheels/: what the host's Python lacks
- peers/: the wheels of what section e compares the kernels with; no other section sees them
- artifacts/: built artifacts: embedded-int4, embedded-none, shape-int4, shape-none
- text/: the tokens on which section g trains the proxy, as `tools/train_proxy.py text` writes them, and compressed
- plugin/: the TensorRT plugin with machine code of sm_90a, and its test driver, as plugin_bundle.py writes them
- bundle.json: what pack.py was told, and what it made
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_host.section import Host

FILE = "bundle.json"
FORMAT = 1
TREE = "tree"
WHEELS = "wheels"
PEERS = "peers"
TEXT = "text"
ARTIFACTS = "artifacts"
PLUGIN = "plugin"
MODELS = ("embedded", "shape")  # the trained model inside h1export; the random one of bundle.json's "shape"
QUANTS = ("int4", "none")


def facts(bundle: Path) -> dict[str, Any]:
    """Read bundle.json.

    Raises:
        SystemExit: ``bundle`` is not a joined bundle of this format.
    """
    path = bundle / FILE
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise SystemExit(f"gpu_host: {path}: is not there or no JSON; give the folder that join.py made") from None
    if not isinstance(read, dict) or read.get("format") != FORMAT:
        raise SystemExit(f"gpu_host: {path}: is of another format than {FORMAT}; use the run.py of the same bundle")
    return read


def tree(host: Host) -> Path:
    """Return the folder with tests, tools, benchmarks and pyproject.toml."""
    return host.bundle / TREE


def artifact(host: Host, model: str, quant: str) -> Path:
    """Return the folder of an artifact made by `--target ort --graph cuda --method rtn`.

    Args:
        host: where the section runs.
        model: "embedded" or "shape".
        quant: "int4" or "none".

    Raises:
        FileNotFoundError: the group of the bundle that has it was not joined, or the section "shape" did not run.
    """
    name = f"{model}-{quant}"
    made = host.work / ARTIFACTS / name
    folder = made if model == "shape" and made.is_dir() else host.bundle / ARTIFACTS / name
    if not (folder / "manifest.json").is_file() or not (folder / "model.onnx.data").is_file():
        raise FileNotFoundError(f"{folder}: is not complete; join the groups core and shape, and run section s first")
    return folder


def checkpoint(host: Host) -> Path:
    """Return the random checkpoint of the shape, which section s makes from its seed.

    Raises:
        FileNotFoundError: section s did not run.
    """
    folder = host.work / "checkpoint"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: is not there; run section s first")
    return folder
