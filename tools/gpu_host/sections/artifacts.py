"""Section (d): the bundle's CUDA artifacts on ONNX Runtime, against transformers, and where their nodes ran."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from gpu_host import bundle, dry
from gpu_host.captured import captured
from gpu_host.section import Figure, Host, Row
from h1export import host as machine
from h1export.artifact.artifact import Artifact
from h1export.checkpoint.resolve import embedded_model
from h1export.commands.build import build_artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import ATTENTION_MASK, INPUT_IDS, Array, Ids, StateSpec
from h1export.quantize.scheme import QuantScheme
from h1export.report import report
from h1export.report.checks import Comparison
from h1export.runtime.runner import Comparable
from h1export.targets.onnx import sdk
from h1export.targets.onnxruntime import cuda_libraries
from h1export.targets.onnxruntime.inference_session import PROVIDER_OPTIONS
from h1export.targets.onnxruntime.layouts import MODEL
from h1export.targets.onnxruntime.options import OrtOptions
from h1export.targets.onnxruntime.variants import CPU, CUDA
from h1export.validate.accuracy.parity import JudgedRun, case_rows, run_cases
from h1export.validate.accuracy.reference import Reference
from h1export.validate.accuracy.run import ValidateOptions, validated
from h1export.validate.accuracy.states import row_of_batch
from h1export.validate.accuracy.tolerances import tolerances_of

STEPS, DRY_STEPS = 128, 4  # of captured decode
PROMPT, CAPTURED_BATCH = 8, 2
# of the largest logit; two fp16 computations of one step, whose attention may add in another order. The faults that
# tests/targets/onnxruntime/test_fixed_decode.py plants exceed it.
CAPTURED_ERROR = 1e-2
SHAPE_BEGINS_S = 35  # seconds of the section after which the 0.5B shape does not begin
PASSED = {report.Verdict.PASS: True, report.Verdict.FAIL: False}  # rows of neither have no tolerance, or do not apply
THREADS = 4  # of the graph in float32 on the CPU: the embedded model is small
MEMCPY = ("MemcpyFromHost", "MemcpyToHost")
# ONNX Runtime itself leaves to the CPU what computes shapes from shapes, which are integers
SHAPES = frozenset({"Cast", "Concat", "Gather", "Shape", "Slice", "Squeeze", "Sub", "Unsqueeze"})
SHAPE_DTYPES = frozenset({"int32", "int64"})


def run(host: Host) -> Iterator[Row]:
    """Yield one row for each comparison of each artifact, one of captured decode, and one of where its nodes ran.

    The embedded model's artifacts are validated: the bundle has its checkpoint. PyTorch's reference of the 0.5B shape
    would take the section's time, so its int4 artifact is compared with the same graph in float32 on the CPU, in the
    quick cases. In a dry run the embedded int4 artifact is built here, and the CPU provider runs the graph.
    """
    start = time.monotonic()
    provider = CPU if host.dry else CUDA
    if host.dry:
        dry.use_cpu_provider()
    quants: tuple[Literal["int4", "none"], ...] = ("int4",) if host.dry else ("int4", "none")
    for quant in quants:
        name = f"embedded-{quant}"
        try:
            artifact = _built(host, quant) if host.dry else Artifact.open(bundle.artifact(host, "embedded", quant))
            yield from _validated(name, artifact, quick=host.dry)
            yield captured_decode(name, artifact, steps=DRY_STEPS if host.dry else STEPS)
            yield _placements(name, artifact, provider, work=host.work)
        except (H1ExportError, FileNotFoundError) as error:
            lacking = host.dry and dry.has_no_kernel(error)  # of the CUDA graph, which the CPU provider need not run
            yield Row(name, None if lacking else False, detail=str(error))
    if not host.dry:
        yield from _shape(host, start)


def _shape(host: Host, start: float) -> Iterator[Row]:
    """Yield the rows of the 0.5B shape's int4 artifact, or why there are none."""
    name = "shape-int4"
    if bundle.facts(host.bundle)["shape"] is None:
        yield Row(name, None, detail="the bundle was made without the group shape")
        return
    if (spent := time.monotonic() - start) > SHAPE_BEGINS_S:
        yield Row(name, None, detail=f"left out: {spent:.0f} s had gone, and it may take the rest of the section")
        return
    try:
        artifact = Artifact.open(bundle.artifact(host, "shape", "int4"))
        yield captured_decode(name, artifact, steps=STEPS)
        yield from drift(name, artifact)
    except (H1ExportError, FileNotFoundError) as error:
        yield Row(name, False, detail=str(error))


def _built(host: Host, quant: Literal["int4", "none"]) -> Artifact:
    out = host.work / f"ort-cuda-{quant}"
    return build_artifact(
        embedded_model(),
        "ort",
        out,
        scheme=QuantScheme(quant, 32, "rtn"),
        options=OrtOptions(graph="cuda"),
        force=True,  # an earlier dry run in the same folder has left its own
    )


@dataclass(frozen=True)
class Told:
    """A Progress that prints each stage and the seconds before it to the section's log."""

    since: float

    def stage(self, name: str, total_bytes: int = 0) -> None:
        """Print the stage that begins."""
        print(f"{time.monotonic() - self.since:.1f} s: {name}", flush=True)

    def advance(self, nbytes: int) -> None:
        """Do nothing."""


def _validated(name: str, artifact: Artifact, *, quick: bool) -> Iterator[Row]:
    """Yield a row for each row of validate's report: all cases, 512 decode steps and states in float32 among them."""
    found = validated(
        artifact,
        load_runner(artifact),
        load_runner(artifact, threads=min(THREADS, machine.cores()), float32=True),
        checkpoint=embedded_model(),
        options=ValidateOptions(pairs=0, quick=quick),
        progress=Told(time.monotonic()),
    )
    yield from _reported(name, found)


def _reported(name: str, rows: Iterable[report.Row]) -> Iterator[Row]:
    for row in rows:
        figures: dict[str, Figure] = {key: float(value) for key, value in row.figures.items()}
        what = " ".join(filter(None, (name, str(row.kind), str(row.comparison), row.case)))
        yield Row(what, PASSED.get(row.verdict), figures, row.note)


@dataclass(frozen=True)
class InFloat32:
    """The same graph in float32 on the CPU, where `case_rows` takes the PyTorch reference."""

    runner: Comparable[Any]

    def full(self, ids: Ids) -> tuple[Array, dict[str, Array]]:
        """Return the logits [seq, vocab] and the states of one call with ids int64 [seq]."""
        runner = self.runner
        logits, states = runner.step(ids[None], np.ones((1, len(ids)), np.int64), runner.initial(1))
        return logits[0], row_of_batch(runner.snapshot(states), StateSpec.of(runner.config), 0, pad=0)


def drift(name: str, artifact: Artifact) -> Iterator[Row]:
    """Yield a row for each quick case: the artifact as it ships beside its graph in float32 on the CPU."""
    runner = load_runner(artifact)
    exact = load_runner(artifact, float32=True)  # 0.5 billion weights: on all cores
    shipped, reference = runner.provenance.float32, cast("Reference", InFloat32(exact))
    limits = tolerances_of(artifact.manifest, shipped, True, chosen={})
    for made in run_cases(runner, seed=0, quick=True):
        yield from _reported(name, case_rows([JudgedRun(Comparison.DRIFT, made, limits)], reference, runner.config))


def captured_decode(name: str, artifact: Artifact, *, steps: int) -> Row:
    """Return the row of a session's decode in a captured CUDA graph beside one whose kernels are launched one by one.

    Both get the same tokens. On the CPU provider the first has the same fixed shapes, and nothing is captured.
    """
    runner = load_runner(captured(artifact))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, runner.config.vocab_size, (CAPTURED_BATCH, PROMPT + steps))
    sessions = [each.start(*ids.shape) for each in (runner, load_runner(artifact))]
    for session in sessions:
        session.append(ids[:, :PROMPT])
    worst = 0.0
    for at in range(PROMPT, ids.shape[1]):
        ours, launched = (session.append(ids[:, at : at + 1]) for session in sessions)
        worst = max(worst, float(np.abs(ours - launched).max() / np.abs(launched).max()))
    figures: dict[str, Figure] = {"steps": steps, "batch": CAPTURED_BATCH, "relative_error": worst}
    return Row(f"{name} captured decode", worst <= CAPTURED_ERROR, figures)


def _placements(name: str, artifact: Artifact, provider: str, *, work: Path) -> Row:
    """Run a prefill and a decode step under ONNX Runtime's profiler, and count the nodes by where they ran."""
    ort = sdk.onnxruntime()
    if provider == CUDA:
        cuda_libraries.preload()
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(work / f"{name}-profile")
    chain = [(each, PROVIDER_OPTIONS.get(each, {})) for each in dict.fromkeys((provider, CPU))]
    session = ort.InferenceSession(str(artifact.folder / MODEL), options, providers=chain)
    tensors = StateSpec.of(artifact.config).tensors
    states = load_runner(artifact).initial(1)
    past = 0
    for tokens in (8, 1):
        given = {INPUT_IDS: np.ones((1, tokens), np.int64), ATTENTION_MASK: np.ones((1, past + tokens), np.int64)}
        present = session.run([tensor.present for tensor in tensors], {**given, **states})
        states = {tensor.past: state for tensor, state in zip(tensors, present, strict=True)}
        past += tokens
    return placed(name, json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")), provider)


def placed(name: str, events: list[Mapping[str, Any]], provider: str) -> Row:
    """Return the row of a profile's events; it fails where a node that computes activations fell back to the CPU."""
    ran: set[tuple[str, str, str]] = set()
    fell: set[str] = set()
    for event in events:
        where = event.get("args", {})
        if "provider" in where and "op_name" in where:
            ran.add((str(event["name"]), where["op_name"], where["provider"]))
            if where["provider"] != provider and not _computes_shapes(where):
                fell.add(where["op_name"])
    count = Counter((kind, at) for _, kind, at in ran)
    fallen = sorted(fell - set(MEMCPY))
    figures: dict[str, Figure] = {
        "nodes": len(ran),
        "nodes_on_provider": sum(number for (_, at), number in count.items() if at == provider),
        "memcpy_nodes": sum(number for (kind, _), number in count.items() if kind in MEMCPY),
    }
    return Row(
        f"{name} node placements", bool(ran) and not fallen, figures, f"on the CPU: {', '.join(fallen)}" * bool(fallen)
    )


def _computes_shapes(node: Mapping[str, Any]) -> bool:
    """Whether a node of a profile computes shapes: its operator may, and all that goes in or out is integers.

    Shape may look at anything. A node whose dtypes the profile does not tell counts as one that computes activations.
    """
    kind = node["op_name"]
    sides = ("output_type_shape",) if kind == "Shape" else ("input_type_shape", "output_type_shape")
    dtypes = [set(value) for side in sides for value in node.get(side, ())]
    return kind in SHAPES and bool(dtypes) and all(found <= SHAPE_DTYPES for found in dtypes)
