"""The way of the data, wired: checkpoint -> spec -> trace -> passes -> target -> artifact. Nothing here computes anything."""

from __future__ import annotations

import dataclasses
import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from h1export import __version__
from h1export.core.artifact import MANIFEST, Artifact, Manifest, file_table, staged
from h1export.core.progress import Progress, Silent
from h1export.core.protocols import Runner
from h1export.core.quant import QuantScheme
from h1export.core.spec import HybridSpec
from h1export.core.weights import WeightStore
from h1export.errors import H1ExportError
from h1export.graphs.passes import run_passes
from h1export.graphs.trace import trace
from h1export.targets import MODULES, BuildOptions, get_target

CARRIED = (  # files of a checkpoint that an artifact carries as they are
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def build(
    checkpoint: Path,
    target: str,
    out: Path,
    scheme: QuantScheme = QuantScheme(),  # noqa: B008  frozen
    options: BuildOptions = BuildOptions(),  # noqa: B008  frozen
    force: bool = False,
    progress: Progress = Silent(),  # noqa: B008  stateless
) -> Artifact:
    """Export ``checkpoint`` to ``target`` as the folder ``out``, which appears complete or not at all.

    Raises:
        H1ExportError: a checkpoint, scheme or option that cannot be exported, or an ``out`` that is taken.
    """
    progress.stage("checkpoint")
    spec = HybridSpec.load(checkpoint)
    store = WeightStore.open(checkpoint, spec)
    scheme.check(spec)
    with staged(out, force) as folder:
        _carry(checkpoint, folder)
        progress.stage("trace")
        program = run_passes(trace(spec, options.last_logits))
        lowered = get_target(target).lower(program, store, scheme, options, folder, progress)
        progress.stage("fingerprint")
        manifest = Manifest(
            target=target,
            source=store.fingerprint(),
            spec=dataclasses.asdict(spec),
            scheme=dataclasses.asdict(scheme),
            options=dataclasses.asdict(options),
            toolchain={"h1export": __version__, "numpy": metadata.version("numpy"), **lowered.toolchain},
            inputs=lowered.inputs,
            outputs=lowered.outputs,
            weights=lowered.weights,
            files=file_table(folder),
        )
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Artifact.open(out)


def _carry(checkpoint: Path, folder: Path) -> None:
    for name in CARRIED:
        source = checkpoint / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
    generation = folder / "generation_config.json"
    if generation.exists():
        try:
            readable = isinstance(json.loads(generation.read_text(encoding="utf-8")), dict)
        except ValueError:
            readable = False
        if not readable:
            raise H1ExportError(checkpoint / generation.name, "not a JSON object", "download it again, or delete it")


def load(artifact: Artifact, threads: int = 0) -> Runner[Any]:
    """A Runner over ``artifact`` by the target that made it."""
    name = artifact.manifest.target
    if name not in MODULES:
        raise H1ExportError(artifact.folder / MANIFEST, f"target {name!r} is unknown", f"this h1export knows {', '.join(MODULES)}")
    return get_target(name).load(artifact, threads)
