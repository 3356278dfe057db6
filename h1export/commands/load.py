"""Load an artifact to run it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import MANIFEST
from h1export.checkpoint.lora import described
from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError, naming_extras
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.quantize.scheme import ADAPTERS
from h1export.runtime.runner import Inspectable
from h1export.targets import Kernels, TargetOptions, all_kernels, load_function, options_class, target_infos
from h1export.targets.options import KERNELS


def read_options(artifact: Artifact) -> TargetOptions:
    """Return the options that ``artifact`` was built with.

    Raises:
        H1ExportError: an unknown target, option or value.
    """
    name = artifact.manifest.target
    if name not in target_infos():
        raise H1ExportError(
            artifact.folder / MANIFEST,
            f"target {name!r} is unknown",
            f"this h1export knows {', '.join(target_infos())}",
        )
    return options_class(name).read(artifact)


def load_runner(
    artifact: Artifact, threads: int = 0, float32: bool = False, *, kernels: Kernels = "auto"
) -> Inspectable[Any]:
    """Return a Runner over ``artifact`` from its target; the other arguments are those of ``targets.loading.Load``.

    Raises:
        H1ExportError: an unknown target or option, or an artifact that does not run here or in the named runtime.
    """
    read_options(artifact)
    others = target_infos()[artifact.manifest.target].other_runtimes
    if kernels not in (*KERNELS, *others):
        known = kernels in all_kernels()
        what = f"an artifact of --target {artifact.manifest.target} does not run in it" if known else "is unknown"
        raise H1ExportError(f"kernels {kernels}", what, f"one of {', '.join((*KERNELS, *others))}")
    with naming_extras():
        return load_function(artifact.manifest.target)(artifact, threads, float32, kernels=kernels)


def load_folder(
    out: str | Path,
    threads: int = 0,
    float32: bool = False,
    *,
    kernels: Kernels = "auto",
    runtime: str | None = None,
    verify: str | Path | None = None,
) -> Inspectable[Any]:
    """Return a Runner over the artifact in the folder ``out``; this is ``h1export.load``. Threads may share it.

    ``runtime`` is a runtime beside the target's own, such as "openvino", which ``kernels`` could name as well.
    ``verify`` is a file with the public key of whoever must have signed it, see ``h1export verify``. The other
    arguments are those of ``targets.loading.Load``.

    Raises:
        H1ExportError: a damaged artifact, one that is not signed by this key, or one that does not run here.
    """
    return load_runner(open_artifact(Path(out), verify), threads, float32, kernels=runtime or kernels)


def open_artifact(out: Path, verify: str | Path | None = None) -> Artifact:
    """Return the artifact in ``out``; ``verify`` is the file of the key that must have signed it, or None.

    Raises:
        H1ExportError: a damaged artifact, or one that is not signed by this key.
    """
    if verify is None:
        return Artifact.open(out)
    from h1export.artifact import signature  # the library of its algorithms is loaded where it is used

    return signature.verify(out, Path(verify))


def check_source(artifact: Artifact, checkpoint: Path, adapters: Sequence[Path] = ()) -> None:
    """Check that ``artifact`` was built from ``checkpoint`` with ``adapters``; raise H1ExportError where it was not."""
    config = FalconH1Config.load(checkpoint)
    store = WeightStore.open(checkpoint, config, adapters=adapters)
    if store.fingerprint() != artifact.manifest.source or config != artifact.config:
        raise H1ExportError(
            artifact.folder, f"was not built from {checkpoint}", "give the checkpoint it was built from as MODEL"
        )
    merged = artifact.manifest.scheme.get(ADAPTERS, [])
    if merged != described(store.adapters):
        what = f"has {len(merged)} adapters merged, and they are not the {len(store.adapters)} given"
        raise H1ExportError(artifact.folder, what, "give those it was built with by --adapter, in order")
