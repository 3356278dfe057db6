"""The way of the data, wired: checkpoint -> spec -> trace -> passes -> target -> artifact. Nothing here computes anything."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from h1export import __version__, host
from h1export.artifact.artifact import NO_SHA256, REPORT, Artifact, file_table
from h1export.artifact.manifest import MANIFEST, Manifest
from h1export.artifact.staging import Stage, check_place, dry_stage, staged
from h1export.checkpoint.resolve import embedded_model
from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.tokenizer import TOKENIZER, chat_prompt, load_tokenizer, scoring_ids, stream
from h1export.commands import plan as planning
from h1export.commands.plan import Plan
from h1export.errors import H1ExportError
from h1export.graphs.passes import passes_for, run_passes
from h1export.graphs.trace import trace
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.special_tokens import GENERATION_CONFIG, special_tokens
from h1export.model.falcon_h1.states import Ids, StateSpec
from h1export.progress import SILENT, Progress
from h1export.quantize.budget import Sensitivity
from h1export.quantize.calibration import Calibration
from h1export.quantize.cost import cost_of
from h1export.quantize.methods.select import integers_of, rounded
from h1export.quantize.scheme import PREQUANTIZED, QuantScheme
from h1export.quantize.sensitivity import sensitivities
from h1export.quantize.source import QuantizedWeights
from h1export.report.report import Report
from h1export.runtime.generation import Sampling, generate
from h1export.runtime.runner import Inspectable
from h1export.targets import MODULES, BuildOptions, Kernels, get_target
from h1export.validate.accuracy.run import ValidateOptions
from h1export.validate.accuracy.run import validate as run_validation

SENSITIVITY_SAMPLES = 4  # each goes through half the model once for every tensor
HELDOUT = "heldout.txt"  # in the embedded model's folder
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
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class BuildJob:
    """One export, checked and not begun.

    Attributes:
        integers: where a method looks at a text, only their precisions are final.
        ids: calibration tokens [samples, length], where the scheme's method looks at some.
    """

    checkpoint: Path
    target: str
    scheme: QuantScheme
    options: BuildOptions
    calibration: Calibration
    config: FalconH1Config
    store: WeightStore
    integers: QuantizedWeights
    ids: Ids | None

    @classmethod
    def open(
        cls,
        checkpoint: Path,
        target: str,
        scheme: QuantScheme,
        options: BuildOptions,
        calibration: Calibration,
        progress: Progress,
    ) -> BuildJob:
        """Raises H1ExportError for a checkpoint, scheme, option or calibration text that cannot be exported."""
        progress.stage("checkpoint")
        config = FalconH1Config.load(checkpoint)
        store = WeightStore.open(checkpoint, config, progress)
        scheme.check(config)
        special_tokens(checkpoint, config)  # refused here rather than when somebody generates
        integers = rounded(store, config, scheme)
        ids = calibration.ids(checkpoint) if scheme.calibrated else None
        return cls(
            checkpoint,
            target,
            scheme,
            options=options,
            calibration=calibration,
            config=config,
            store=store,
            integers=integers,
            ids=ids,
        )

    def manifest(self, source: str) -> Manifest:
        """What is known of the artifact before its first byte; ``source`` is the checkpoint's fingerprint."""
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
        """What decided the integers."""
        scheme = dataclasses.asdict(self.scheme)
        if self.store.gptq_format is not None:
            ready = dataclasses.asdict(self.store.gptq_format)
            return scheme | {"quant": f"int{self.store.gptq_format.bits}", "method": PREQUANTIZED, PREQUANTIZED: ready}
        return scheme | ({} if self.ids is None else {"calibration": self.calibration.described(self.ids)})

    def write(self, manifest: Manifest, stage: Stage, progress: Progress) -> Manifest:
        """Write every file of the artifact into ``stage`` and complete the ``manifest``, which is the last of them."""
        for name in CARRIED:
            if (self.checkpoint / name).is_file():
                shutil.copyfile(self.checkpoint / name, stage.folder / name)
        progress.stage("trace")
        program = run_passes(trace(self.config, self.options.last_logits), passes_for(self.store.order_name))
        if self.ids is not None and not stage.dry:
            with dry_stage() as dry:  # what the target refuses, it refuses before the long work
                store, integers = integers_of(
                    self.store, self.config, self.scheme, ids=self.ids, stage=dry, progress=SILENT
                )
                get_target(self.target).lower(
                    program, store, integers, options=self.options, stage=dry, progress=SILENT
                )
        store, integers = integers_of(
            self.store, self.config, self.scheme, ids=self.ids, stage=stage, progress=progress
        )
        lowered = get_target(self.target).lower(
            program, store, integers, options=self.options, stage=stage, progress=progress
        )
        progress.stage("hashes")
        files = file_table(stage.folder, sizes_only=stage.dry)
        found = {
            name: getattr(lowered, name) for name in ("inputs", "outputs", "weights", "weights_file", "requirements")
        }
        manifest = dataclasses.replace(manifest, **found, files=files)
        (stage.folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        return manifest


def build(
    checkpoint: Path,
    target: str,
    out: Path,
    scheme: QuantScheme = QuantScheme(),  # noqa: B008  frozen
    options: BuildOptions = BuildOptions(),  # noqa: B008  frozen
    force: bool = False,
    progress: Progress = SILENT,
    jobs: int = 0,
    calibration: Calibration = Calibration(),  # noqa: B008  frozen
) -> Artifact:
    """Export ``checkpoint`` to ``target`` as the folder ``out``, which appears complete or not at all.

    A build that was killed goes on where it stopped. ``jobs`` threads compute weights (0: one a core); no byte depends on it.
    ``calibration`` is for a scheme whose method looks at a text.

    Raises:
        H1ExportError: a checkpoint, scheme or option that cannot be exported, or an ``out`` that is taken.
    """
    check_place(out, force)
    export = BuildJob.open(checkpoint, target, scheme, options, calibration, progress)
    progress.stage("fingerprint", export.store.nbytes)
    manifest = export.manifest(export.store.fingerprint())
    with staged(out, force, manifest.key) as folder:
        export.write(manifest, Stage(folder, jobs or host.cores()), progress)
    return Artifact.open(out)


def sensitivity(
    checkpoint: Path,
    scheme: QuantScheme,
    calibration: Calibration = Calibration(),  # noqa: B008  frozen
    progress: Progress = SILENT,
    jobs: int = 0,
) -> dict[str, Sensitivity]:
    """Of every product's weight, in the integers that the scheme's method gives it, on the first samples of the calibration text.

    Raises:
        H1ExportError: a checkpoint, scheme or calibration text that cannot be used.
    """
    config = FalconH1Config.load(checkpoint)
    store = WeightStore.open(checkpoint, config)
    scheme.check(config)
    ids = calibration.ids(checkpoint)
    jobs = jobs or host.cores()
    with tempfile.TemporaryDirectory(prefix="h1export-sensitivity-") as folder:
        store, integers = integers_of(
            store, config, scheme, ids=ids, stage=Stage(Path(folder), jobs), progress=progress
        )
        return sensitivities(store, config, integers, ids=ids[:SENSITIVITY_SAMPLES], jobs=jobs, progress=progress)


def plan(
    checkpoint: Path,
    target: str,
    out: Path,
    scheme: QuantScheme,
    options: BuildOptions,
    contexts: Sequence[int] = (),
    progress: Progress = SILENT,
    jobs: int = 0,
    calibration: Calibration = Calibration(),  # noqa: B008  frozen
) -> Plan:
    """What ``build`` with these arguments would make and need; ``contexts``: lengths at which to give the size of the states.

    Raises:
        H1ExportError: a checkpoint, scheme or option that cannot be exported.
    """
    export = BuildJob.open(checkpoint, target, scheme, options, calibration, progress)
    jobs = jobs or host.cores()
    start = time.perf_counter()
    with dry_stage() as stage:
        export.write(export.manifest(NO_SHA256), stage, progress)
        files = file_table(stage.folder, sizes_only=True)
    lowering = time.perf_counter() - start
    sizes = {name: size for name, (_, size) in files.items()}
    cost = (
        None
        if export.ids is None
        else cost_of(
            scheme.method, export.store, export.config, tensors=scheme.precisions(export.config), ids=export.ids
        )
    )
    return Plan(
        target,
        str(out),
        sizes,
        peak_bytes=planning.peak_bytes(jobs) + (cost.peak_bytes(jobs) if cost else 0),
        seconds=lowering
        + planning.seconds(export.store, scheme, export.integers, sum(sizes.values()), jobs)
        + (cost.seconds(jobs) if cost else 0),
        source_bytes=export.store.nbytes,
        disk_free=planning.disk_free(out),
        scratch_bytes=cost.disk_bytes if cost else 0,
        state_bytes={context: StateSpec.of(export.config).nbytes(1, context) for context in contexts},
        precisions=planning.precisions(export.integers, export.config),
    )


def load(artifact: Artifact, threads: int = 0, float32: bool = False, kernels: Kernels = "auto") -> Inspectable[Any]:
    """A Runner over ``artifact`` by the target that made it; the arguments are those of ``Target.load``."""
    name = artifact.manifest.target
    if name not in MODULES:
        raise H1ExportError(
            artifact.folder / MANIFEST, f"target {name!r} is unknown", f"this h1export knows {', '.join(MODULES)}"
        )
    return get_target(name).load(artifact, threads, float32, kernels)


def load_folder(
    out: str | Path, threads: int = 0, float32: bool = False, kernels: Kernels = "auto"
) -> Inspectable[Any]:
    """``h1export.load``: a Runner over the artifact in the folder ``out``; the other arguments are those of ``Target.load``.

    Raises:
        H1ExportError: a damaged artifact, or one that does not run here.
    """
    return load(Artifact.open(Path(out)), threads, float32, kernels)


def check_source(artifact: Artifact, checkpoint: Path) -> None:
    """Raises H1ExportError where ``artifact`` was not built from ``checkpoint``."""
    config = FalconH1Config.load(checkpoint)
    if WeightStore.open(checkpoint, config).fingerprint() != artifact.manifest.source or config != artifact.config:
        raise H1ExportError(
            artifact.folder, f"was not built from {checkpoint}", "give the checkpoint it was built from as MODEL"
        )


def validate(
    out: Path,
    checkpoint: Path,
    tolerances: Mapping[str, float],
    text: Path | None = None,
    text_bytes: int = 0,
    latency_pairs: int = 7,
    threads: int = 0,
    progress: Progress = SILENT,
    kernels: Kernels = "auto",
    bisect: bool = False,
    prompts: int = 8,
    contexts: Sequence[int] = (),
) -> Report:
    """Compare the artifact ``out`` with the reference on ``checkpoint`` and write ``out/report.json``.

    Args:
        tolerances: metric -> tolerance, overriding the defaults.
        text: for bits per byte; None: the held-out text that ships with the embedded model.
        text_bytes: how much of it; 0: all.
        latency_pairs: 0: no latency.
        threads: for artifact and reference; 0: their own choice.
        progress: told what is being done.
        kernels: as of ``Target.load``.
        bisect, prompts, contexts: as of ValidateOptions.

    Raises:
        H1ExportError: a damaged artifact, or a checkpoint that is not the one it was built from.
    """
    artifact = Artifact.open(out)
    progress.stage("hashes")
    artifact.check_hashes()
    check_source(artifact, checkpoint)
    if threads:
        torch.set_num_threads(threads)
    has_tokenizer = (out / TOKENIZER).is_file()
    ids, nbytes = scoring_ids(out, _text(text, text_bytes)) if has_tokenizer else (np.zeros(0, np.int64), 0)
    options = ValidateOptions(
        tolerances, ids, nbytes, pairs=latency_pairs, bisect=bisect, prompts=prompts, contexts=tuple(contexts)
    )
    runner = load(artifact, threads, kernels=kernels)
    exact = runner if runner.provenance.float32 else load(artifact, threads, float32=True, kernels=kernels)
    if not exact.provenance.float32:  # the runtime has no float32 form of it
        exact = runner
    report = run_validation(artifact, runner, exact, checkpoint, options, progress)
    (out / REPORT).write_text(report.to_json(), encoding="utf-8")
    return report


def _text(path: Path | None, nbytes: int) -> str:
    data = (path or embedded_model() / HELDOUT).read_bytes()
    return data[: nbytes or None].decode("utf-8", errors="ignore")


def generate_text(
    out: Path,
    prompt: str,
    max_tokens: int,
    *,
    sampling: Sampling,
    chat: bool = False,
    threads: int = 0,
    kernels: Kernels = "auto",
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[str]:
    """Stream the continuation of ``prompt`` by the artifact ``out``; with ``chat``, it is a user's turn.

    ``tell`` hears why the artifact runs slower here than it could, where it does.

    Raises:
        H1ExportError: a damaged artifact, no tokenizer or chat template, a prompt that does not fit.
    """
    artifact = Artifact.open(out)
    tokenizer = load_tokenizer(out)
    text = chat_prompt(out, prompt) if chat else prompt
    ids = np.array(tokenizer.encode(text, add_special_tokens=not chat).ids, np.int64)  # a template brings its own
    runner = load(artifact, threads, kernels=kernels)
    if runner.provenance.fallback:
        tell(runner.provenance.fallback)
    end = frozenset(special_tokens(out, runner.config).eos)
    yield from stream(tokenizer, generate(runner, ids, max_tokens, sampling=sampling, eos=end))
