"""Side by side on one checkpoint: this project's artifacts, llama.cpp, transformers, and transformers' OnnxExporter.

    python benchmarks/peers.py CHECKPOINT --llama-bench .../llama-bench --gguf model-Q4_0.gguf model-Q4_K_M.gguf \
        --json peers.json --plots FOLDER

All peers take turns round by round, at one thread count after the other; medians over the rounds count, and ratios are
taken round by round. Decode of several rows is in tokens of all rows together; llama.cpp's own batched bench, which has
to lie beside llama-bench, times its side. Every peer has a process of its own; its memory is the peak beyond what its
interpreter held before the model. GGUF files are made beforehand by llama.cpp's tools, so their export is not measured.
Needs the extras ort and bench.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from build import run_watched
from eager import Eager
from llama_bench import LlamaBench
from onnx_exporter import Exported
from peers_report import Cell, Facts, Results, plot, show

from h1export import host
from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateSpec
from h1export.report.checks import Phase
from h1export.validate.speed.bench import interleave
from h1export.validate.speed.memory_traffic import Bandwidth, Turn, step_bytes
from h1export.validate.speed.statistics import estimate, ratio
from h1export.validate.speed.worker import RunnerModel, Timing, WorkerProcess

HERE = Path(__file__).parent
LLAMA, H1EXPORT, EAGER, EXPORTER = PEERS = ("llama.cpp", "h1export", "eager", "OnnxExporter")
STEPS = 32  # tokens in one decode timing
EAGER_STEPS = 8  # it is slower
CACHE_BYTES = {"f16": 2, "q8_0": 34 / 32}  # llama.cpp's type -> bytes of a key's or a value's number


class Measured(Protocol):
    """What a WorkerProcess and LlamaBench have in common."""

    kernels: str

    def speed(self, timing: Timing) -> float: ...

    def finish(self) -> int: ...


@dataclass(frozen=True)
class Peer:
    """One row of the table.

    Attributes:
        facts: what is known before it runs.
        start: thread count -> the peer, loaded.
        step_bytes: depth -> what one decode step has to read.
        warms_itself: whether each of its timings is a process that begins with a warm-up.
    """

    facts: Facts
    start: Callable[[int], Measured]
    step_bytes: Callable[[int], float]
    warms_itself: bool = False


def h1export_peer(checkpoint: Path, group_size: int, scratch: Path) -> Peer:
    """An int4 artifact at accuracy level 4, built here."""
    out = scratch / f"group-{group_size}"
    command = [
        sys.executable,
        str(HERE / "build.py"),
        str(checkpoint),
        "--quant",
        "int4",
        "--group-size",
        str(group_size),
        "--child",
        str(out),
    ]
    seconds, peak = run_watched(command)
    artifact = Artifact.open(out)
    size = sum(size for _, size in artifact.manifest.files.values())
    facts = Facts(
        f"h1export int4 group size {group_size}, accuracy level {artifact.manifest.options['accuracy_level']}",
        size,
        seconds,
        peak,
    )
    return Peer(
        facts,
        lambda threads: WorkerProcess(partial(play, out, threads)),
        partial(step_bytes, artifact.manifest, artifact.config, 1),
    )


def play(out: Path, threads: int) -> RunnerModel:
    """An artifact in a worker process."""
    return RunnerModel(load_runner(Artifact.open(out), threads), STEPS)


def eager(checkpoint: Path, config: FalconH1Config, dtype: str) -> Peer:
    """A run of transformers in ``dtype``."""
    width = {"float32": 4, "bfloat16": 2}[dtype]
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    step = partial(
        least_bytes, config=config, weights=size // 2 * width, embedding_bits=width * 8, kv_bytes=width
    )  # a checkpoint holds bfloat16
    facts = Facts(f"transformers eager {dtype}", size)
    return Peer(
        facts, lambda threads: WorkerProcess(partial(Eager, checkpoint, dtype, threads, steps=EAGER_STEPS)), step
    )


def gguf(program: Path | None, file: Path | None, config: FalconH1Config, *, cache: str) -> Peer:
    """llama.cpp on one GGUF file, with keys and values of a type."""
    if program is None or file is None:
        return absent(LLAMA, "not run: give --llama-bench and --gguf")
    size = file.stat().st_size
    step = partial(least_bytes, config=config, weights=size, embedding_bits=4.5, kv_bytes=CACHE_BYTES[cache])
    return Peer(
        Facts(f"{LLAMA} {file.stem}, {cache} cache", size),
        lambda threads: LlamaBench(program, file, threads, steps=STEPS, cache=cache),
        step,
        warms_itself=True,
    )


def exported(checkpoint: Path, config: FalconH1Config, scratch: Path, *, limit: float) -> Peer:
    """OnnxExporter's graphs, if the export ends within ``limit`` seconds."""
    name = "transformers OnnxExporter float32"
    out = scratch / "exported"
    try:
        seconds, peak = run_watched(
            [sys.executable, str(HERE / "onnx_exporter.py"), str(checkpoint), str(out)], limit=limit
        )
    except subprocess.TimeoutExpired:
        return absent(name, f"export did not finish in {limit:.0f} s")
    except subprocess.CalledProcessError as error:
        return absent(name, f"export failed with exit code {error.returncode}")
    size = sum(file.stat().st_size for file in out.iterdir())
    step = partial(
        least_bytes, config=config, weights=size // 2, embedding_bits=32, kv_bytes=4
    )  # each of its two graphs has all weights
    return Peer(
        Facts(name, size, seconds, peak),
        lambda threads: WorkerProcess(partial(Exported, out, threads, EAGER_STEPS)),
        step,
    )


def absent(name: str, note: str) -> Peer:
    """A row without figures."""

    def start(threads: int) -> Measured:
        raise H1ExportError(name, note, "")

    return Peer(Facts(name, note=note), start, lambda depth: 0)


def least_bytes(depth: int, config: FalconH1Config, weights: float, *, embedding_bits: float, kv_bytes: float) -> float:
    """What a decode step has to read of ``weights`` bytes with an embedding table inside, and of its states.

    The table counts as one row where it is not the head's too; the states are float32 but for keys and values.
    """
    states = StateSpec.of(config)
    spent = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * embedding_bits / 8
    fixed = states.nbytes(1, 0)
    return weights - spent + fixed + (states.nbytes(1, depth) - fixed) * kv_bytes / 4


@dataclass
class Run:
    """One run over all peers, thread count by thread count."""

    peers: list[Peer]
    timings: tuple[Timing, ...]
    rounds: int
    bandwidth: dict[int, Bandwidth] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    peaks: list[tuple[str, int, int]] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)

    def at(self, threads: int) -> None:
        """Measure every peer with ``threads`` threads; the cells of one that fails have the reason."""
        loaded: dict[str, Measured] = {}
        turn = Turn(threads)
        jobs: dict[Any, Callable[[], float]] = {None: turn}
        notes: dict[Any, str] = {}
        for peer in self.peers:
            name = peer.facts.name
            try:
                loaded[name] = peer.start(threads)
            except H1ExportError as error:
                notes |= {(name, timing): error.what for timing in self.timings}
        for timing in self.timings:
            for peer in self.peers:
                key = peer.facts.name, timing
                if key in notes:
                    continue
                jobs[key] = partial(_speed, loaded[peer.facts.name], timing, key=key, notes=notes)
                if not peer.warms_itself:
                    jobs[key]()
            print(f"threads {threads}: {timing.phase} {timing.tokens} warmed up", file=sys.stderr)
        samples = interleave(jobs, self.rounds)
        samples.pop(None)
        self.bandwidth[threads] = Bandwidth.of(turn.reads, self._decode_reads(samples))
        self.cells += [
            self._cell(peer, threads, timing, samples=samples, notes=notes)
            for peer in self.peers
            for timing in self.timings
        ]
        for name, measured in loaded.items():
            self.kernels[name] = measured.kernels
            with suppress(H1ExportError):  # its process has ended, and the cells have the reason
                self.peaks.append((name, threads, measured.finish()))

    def _decode_reads(self, samples: Mapping[Any, list[float]]) -> Iterator[float]:
        """Yield the bytes per second that the fastest decode of each peer and length has read."""
        for peer in self.peers:
            for timing in filter(_is_read_bound, self.timings):
                speeds = [speed for speed in samples.get((peer.facts.name, timing), ()) if not math.isnan(speed)]
                if speeds:
                    yield peer.step_bytes(timing.tokens) * max(speeds)

    def _cell(
        self, peer: Peer, threads: int, timing: Timing, *, samples: Mapping[Any, list[float]], notes: Mapping[Any, str]
    ) -> Cell:
        name = peer.facts.name
        if (name, timing) in notes:
            return Cell(name, threads, timing, note=notes[name, timing])
        found = samples[name, timing]
        speed = estimate(found)
        share = (
            peer.step_bytes(timing.tokens) * speed.median / self.bandwidth[threads].best
            if _is_read_bound(timing)
            else None
        )
        rivals = [
            samples[other.facts.name, timing]
            for other in self.peers
            if is_llama(other) and (other.facts.name, timing) not in notes
        ]
        best = max(rivals, key=lambda rival: estimate(rival).median, default=None)
        return Cell(name, threads, timing, speed, share, ratio(found, best) if best else None, tuple(found))


def _is_read_bound(timing: Timing) -> bool:
    """Whether a step reads every weight once for a single token."""
    return timing.phase is Phase.DECODE and timing.batch == 1


def _speed(measured: Measured, timing: Timing, *, key: Any, notes: dict[Any, str]) -> float:
    """Tokens per second, or NaN where the peer fails, with the reason in ``notes``."""
    try:
        return measured.speed(timing)
    except H1ExportError as error:
        notes[key] = error.what
        return math.nan


def is_llama(peer: Peer) -> bool:
    """Whether the row is one of llama.cpp's."""
    return peer.facts.name.startswith(LLAMA)


def peers_of(args: argparse.Namespace, scratch: Path) -> Iterator[Peer]:
    """Every requested peer, with its export done."""
    config = FalconH1Config.load(args.checkpoint)
    if H1EXPORT in args.peers:
        for group_size in args.group_size:
            yield h1export_peer(args.checkpoint, group_size, scratch)
    if LLAMA in args.peers:
        for file in args.gguf or [None]:
            for cache in args.cache:
                yield gguf(args.llama_bench, file, config, cache=cache)
    if EAGER in args.peers:
        for dtype in ("float32", "bfloat16"):
            yield eager(args.checkpoint, config, dtype)
    if EXPORTER in args.peers:
        yield exported(args.checkpoint, config, scratch, limit=args.export_limit)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's benchmark program")
    parser.add_argument(
        "--gguf", type=Path, nargs="*", default=[], help="the checkpoint as GGUF, one file a quantisation"
    )
    parser.add_argument(
        "--group-size", type=int, nargs="*", default=[32, 128], help="group sizes of h1export's artifacts"
    )
    parser.add_argument(
        "--cache", nargs="*", choices=list(CACHE_BYTES), default=list(CACHE_BYTES), help="llama.cpp's keys and values"
    )
    parser.add_argument("--depth", type=int, nargs="*", default=[0, 2048, 8192, 32768])
    parser.add_argument("--rows", type=int, nargs="*", default=[4, 8, 16], help="sequences decoded together")
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--export-limit", type=float, default=600, help="seconds that OnnxExporter may take")
    parser.add_argument(
        "--scratch", type=Path, help="where exports are stored meanwhile (default: the system's temporary folder)"
    )
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--plots", type=Path, help="folder for one figure a thread count")
    args = parser.parse_args()
    timings = [
        *(Timing(Phase.DECODE, depth) for depth in args.depth),
        *(Timing(Phase.PREFILL, length) for length in args.prefill),
        *(Timing(Phase.DECODE, 0, rows) for rows in args.rows),
    ]
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        run = Run(list(peers_of(args, Path(scratch))), tuple(timings), args.rounds)
        for threads in args.threads:
            run.at(threads)
    facts = tuple(peer.facts for peer in run.peers)
    name = args.checkpoint.resolve().name
    results = Results(
        name, host.machine_facts(), args.rounds, run.bandwidth, run.kernels, facts, tuple(run.peaks), tuple(run.cells)
    )
    if args.json:
        args.json.write_text(json.dumps(asdict(results), indent=1) + "\n", encoding="utf-8")
    show(results)
    if args.plots:
        print(*plot(results, args.plots))


if __name__ == "__main__":
    main()
