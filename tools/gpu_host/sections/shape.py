"""Section s: the random checkpoint of the bundle's shape, and the data files of its artifacts, from the seed.

make_checkpoint.py gives the same bytes everywhere, so that data files of gigabytes need not be carried. The graph and
the manifest are the bundle's; the data file is built here and must have the sha256 of the manifest.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from make_checkpoint import config, write_checkpoint

from gpu_host import bundle
from gpu_host.section import Host, Row
from h1export import cli

DATA = "model.onnx.data"


def run(host: Host) -> Iterator[Row]:
    """Yield a row for the checkpoint, and one for each artifact."""
    shape = bundle.facts(host.bundle)["shape"]
    if shape is None:
        yield Row("checkpoint", None, detail="the bundle was made without the group shape")
        return
    folder = host.work / "checkpoint"
    start = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    write_checkpoint(folder, config(shape["name"], shape["layers"]), 1, seed=shape["seed"])
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    yield Row("checkpoint", True, {"seconds": round(time.monotonic() - start, 2), "mb": round(size / 1e6)})
    for quant in bundle.QUANTS:
        yield _artifact(host, quant, folder)


def _artifact(host: Host, quant: str, checkpoint: Path) -> Row:
    name = f"shape-{quant}"
    carried = host.bundle / bundle.ARTIFACTS / name
    if not (carried / "manifest.json").is_file():
        return Row(name, False, detail="the group shape was not joined; join it")
    if (carried / DATA).is_file():
        return Row(name, True, detail="the bundle has its data file")
    start = time.monotonic()
    built = host.work / f"built-{name}"
    code = cli.run(build_command(checkpoint, quant, built))
    if code != 0:
        return Row(name, False, detail=f"h1export build ended with {code}")
    want, _ = json.loads((carried / "manifest.json").read_text(encoding="utf-8"))["files"][DATA]
    found, _ = json.loads((built / "manifest.json").read_text(encoding="utf-8"))["files"][DATA]
    figures = {"seconds": round(time.monotonic() - start, 2), "sha256": found}
    if found != want:
        shutil.rmtree(built)
        return Row(name, False, figures, f"the data file's sha256 should be {want}")
    made = host.work / bundle.ARTIFACTS / name
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(carried, made)
    (built / DATA).replace(made / DATA)
    shutil.rmtree(built)
    return Row(name, True, figures)


def build_command(checkpoint: Path | None, quant: str, out: Path) -> list[str]:
    """Return the command that makes an artifact of the bundle; pack.py calls it too."""
    model = [] if checkpoint is None else [str(checkpoint)]
    options = ["--target", "ort", "--graph", "cuda", "--quant", quant, "--quiet", "--force", "--out", str(out)]
    return ["build", *model, *options, *(["--method", "rtn"] if quant != "none" else [])]
