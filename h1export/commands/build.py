"""Build an artifact: checkpoint -> config -> trace -> passes -> target -> folder."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from h1export import __version__, host
from h1export.artifact.artifact import Artifact, file_table
from h1export.artifact.manifest import MANIFEST, Manifest
from h1export.artifact.sbom import SBOM, sbom
from h1export.artifact.stage import Stage, dry_stage
from h1export.artifact.staging import check_place, staged
from h1export.checkpoint.chat_template import template_files
from h1export.checkpoint.lora import described
from h1export.checkpoint.packed_formats import ignored_packed_keys
from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.unchanged import SourceFiles
from h1export.checkpoint.vocabulary import check_vocabulary
from h1export.errors import H1ExportError
from h1export.graphs.passes import passes_for, run_passes
from h1export.graphs.trace import trace
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.ignored_keys import told
from h1export.model.falcon_h1.special_tokens import GENERATION_CONFIG, special_tokens
from h1export.model.falcon_h1.states import Ids
from h1export.progress import SILENT, Progress
from h1export.quantize.calibration import Calibration
from h1export.quantize.device import ComputeDevice
from h1export.quantize.grid import OwnTensor
from h1export.quantize.methods.guard import GUARD
from h1export.quantize.methods.select import integers_of, uncalibrated_integers
from h1export.quantize.scheme import ADAPTERS, PREQUANTIZED, QuantScheme
from h1export.quantize.source import QuantizedWeights
from h1export.targets import TargetOptions, get_target, options_class
from h1export.targets.base import HasOwnFormats, SelectiveTarget

MOST_CARRIED = 64 << 20  # bytes of a file
CARRIED = (  # files of a checkpoint that an artifact carries as they are
    "config.json",
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",  # beside it, every file of chat templates
)

CALIBRATION = "calibration"  # the key of a manifest's scheme
MOST_PACKED = 32  # keys of quantization_config that are named: writers describe their whole recipe there


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """A build that was checked and has not begun.

    Attributes:
        checkpoint: the checkpoint's folder.
        target: the target's name.
        scheme: the precisions of the weights and the method that chooses integers.
        options: the target's own options.
        calibration: the settings of the calibration text.
        config: the checkpoint's architecture.
        store: the checkpoint's tensors.
        integers: the integers without calibration; for a method that calibrates, only their precisions are final.
        ids: calibration tokens [samples, length]; None for a method that does not calibrate.
        device: where a method that calibrates runs the model.
    """

    checkpoint: Path
    target: str
    scheme: QuantScheme
    options: TargetOptions
    calibration: Calibration
    config: FalconH1Config
    store: WeightStore
    integers: QuantizedWeights
    ids: Ids | None
    device: ComputeDevice

    @classmethod
    def open(
        cls,
        checkpoint: Path,
        target: str,
        *,
        scheme: QuantScheme,
        options: TargetOptions | None,
        calibration: Calibration,
        progress: Progress = SILENT,
        adapters: Sequence[Path] = (),
    ) -> BuildJob:
        """Check all that can be checked before a weight is read; ``options`` None: the target's defaults.

        ``adapters`` are folders of LoRA adapters to merge, in order.

        Raises:
            H1ExportError: a checkpoint, scheme, option, calibration text or device that cannot be used.
        """
        device = ComputeDevice.of(calibration.device)
        progress.stage("checkpoint")
        own = options_class(target)
        options = own() if options is None else options
        if type(options) is not own:
            what = f"{type(options).__name__} are not the options of target {target}"
            raise H1ExportError("options", what, f"give {own.__name__}")
        scheme = scheme.with_embedding(options.embedding)
        config = FalconH1Config.load(checkpoint)
        runtime = get_target(target)
        if isinstance(runtime, SelectiveTarget):
            runtime.check(config, options)
        store = WeightStore.open(checkpoint, config, progress, adapters=adapters)
        scheme.check(config)
        check_vocabulary(checkpoint, config.vocab_size)
        _check_carried(checkpoint)
        special_tokens(checkpoint, config)  # refuses wrong ones now rather than when a text is generated
        return cls(
            checkpoint=checkpoint,
            target=target,
            scheme=scheme,
            options=options,
            calibration=calibration,
            config=config,
            store=store,
            integers=uncalibrated_integers(store, config, scheme),
            ids=calibration.ids(checkpoint) if scheme.calibrated else None,
            device=device,
        )

    def manifest(self, source: str) -> Manifest:
        """Return the part of the manifest that is known before a build; ``source`` is the checkpoint's fingerprint."""
        packages = get_target(self.target).packages
        return Manifest(
            target=self.target,
            source=source,
            config=dataclasses.asdict(self.config),
            scheme=self._scheme(),
            options=dataclasses.asdict(self.options),
            toolchain={"h1export": __version__, **{name: metadata.version(name) for name in packages}},
            inputs={},
            outputs={},
            weights=(),
            weights_file="",
            files={},
        )

    def _scheme(self) -> dict[str, Any]:
        """Return the manifest's record of what decides the integers."""
        scheme = dataclasses.asdict(self.scheme)
        if self.store.adapters:
            scheme[ADAPTERS] = described(self.store.adapters)
        if self.store.packed_format is not None:
            packed_format = dataclasses.asdict(self.store.packed_format)
            return scheme | {
                "quant": f"int{self.store.packed_format.bits}",
                "method": PREQUANTIZED,
                PREQUANTIZED: packed_format,
            }
        return scheme | (
            {} if self.ids is None else {CALIBRATION: self.calibration.described(self.ids, self.device.name)}
        )

    def write(self, manifest: Manifest, stage: Stage, progress: Progress) -> Manifest:
        """Write every file of the artifact into ``stage``, the ``manifest`` last; return it complete."""
        target = get_target(self.target)
        for name in carried(self.checkpoint):
            (stage.folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.checkpoint / name, stage.folder / name)
        progress.stage("trace")
        program = run_passes(trace(self.config, self.options.traces_last), passes_for(self.store.order_name))
        own: Mapping[str, OwnTensor] = {}
        if isinstance(target, HasOwnFormats):
            own = target.own_tensors(program, self.store, self.integers, options=self.options)
        if self.ids is not None and not stage.dry:
            with dry_stage() as dry:  # a target that refuses the model does so before the long calibration
                store, integers, _ = integers_of(
                    self.store, self.config, self.scheme, ids=self.ids, stage=dry, progress=SILENT
                )
                target.lower(program, store, integers, options=self.options, stage=dry, progress=SILENT)
        store, integers, guard = integers_of(
            self.store,
            self.config,
            self.scheme,
            ids=self.ids,
            stage=stage,
            progress=progress,
            device=self.device,
            own=own,
        )
        lowered = target.lower(program, store, integers, options=self.options, stage=stage, progress=progress)
        (stage.folder / SBOM).write_text(sbom(manifest), encoding="utf-8")
        progress.stage("hashes")
        files = file_table(stage.folder, sizes_only=stage.dry)
        names = ("inputs", "outputs", "weights", "weights_file", "requirements")
        found = {name: getattr(lowered, name) for name in names}
        if guard is not None:
            calibration = manifest.scheme[CALIBRATION] | {GUARD: guard.described()}
            found["scheme"] = {**manifest.scheme, CALIBRATION: calibration}
        manifest = dataclasses.replace(manifest, **found, files=files)
        (stage.folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        return manifest


def carried(checkpoint: Path) -> tuple[str, ...]:
    """Return the names of the files of ``checkpoint`` that an artifact carries as they are."""
    return (*(name for name in CARRIED if (checkpoint / name).is_file()), *template_files(checkpoint))


def _check_carried(checkpoint: Path) -> None:
    """Check that the files which an artifact carries are small, before hours of work.

    Raises:
        H1ExportError: one is not.
    """
    for name in carried(checkpoint):
        size = (checkpoint / name).stat().st_size
        if size > MOST_CARRIED:
            what = f"has {size} bytes, and an artifact carries at most {MOST_CARRIED} of it"
            raise H1ExportError(checkpoint / name, what, "download it again")


def ignored_in(checkpoint: Path) -> tuple[str, ...]:
    """Return a line each for keys, tensors and keys of the quantisation that change nothing in ``checkpoint``.

    Raises:
        H1ExportError: a checkpoint that cannot be exported.
    """
    config = FalconH1Config.load(checkpoint)
    found = {"config.json: ignored": FalconH1Config.ignored(checkpoint)}
    found["weights: ignored"] = WeightStore.open(checkpoint, config).ignored
    lines = [f"{place} {told(names)}: no part of the model" for place, names in found.items() if names]
    if names := ignored_packed_keys(checkpoint):
        lines.append(
            f"config.json: quantization_config: ignored {told(names, MOST_PACKED)}: no integer depends on them"
        )
    return tuple(lines)


def build_artifact(
    checkpoint: Path,
    target: str,
    out: Path,
    *,
    scheme: QuantScheme = QuantScheme(),  # noqa: B008  frozen
    options: TargetOptions | None = None,
    force: bool = False,
    progress: Progress = SILENT,
    jobs: int = 0,
    calibration: Calibration = Calibration(),  # noqa: B008  frozen
    adapters: Sequence[Path] = (),
) -> Artifact:
    """Export ``checkpoint`` to ``target`` as the folder ``out``, which appears complete or not at all.

    A build that was killed continues where it stopped. No byte depends on ``jobs``.

    Args:
        checkpoint: the checkpoint's folder.
        target: the target's name.
        out: the folder to make.
        scheme: the precisions of the weights and the method that chooses integers.
        options: the target's own options; None: its defaults.
        force: replace an artifact at ``out``.
        progress: receives the stages of the build.
        jobs: threads that compute weights; 0: one a core.
        calibration: the calibration text, for a method that needs one.
        adapters: folders of LoRA adapters, which are merged into the weights in this order.

    Raises:
        H1ExportError: a checkpoint, scheme or option that cannot be exported, a checkpoint that changes meanwhile, or
            an ``out`` that is taken.
    """
    check_place(out, force)
    sources = SourceFiles.of((checkpoint, *adapters))
    job = BuildJob.open(
        checkpoint,
        target,
        scheme=scheme,
        options=options,
        calibration=calibration,
        progress=progress,
        adapters=adapters,
    )
    progress.stage("fingerprint", job.store.nbytes)
    manifest = job.manifest(job.store.fingerprint())
    with staged(out, force, manifest.key) as folder:
        job.write(manifest, Stage(folder, jobs or host.cores()), progress)
        sources.check()
    return Artifact.open(out)
