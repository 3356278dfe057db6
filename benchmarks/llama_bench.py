"""llama.cpp as a peer: one run of its own llama-bench for every timing, and of llama-batched-bench for several rows."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

from build import run_watched

from h1export.errors import H1ExportError
from h1export.report.checks import Phase
from h1export.validate.speed.worker import Timing


class LlamaBench:
    """A GGUF file under llama-bench, timed as a WorkerProcess is.

    Each run warms up and fills the context itself. Several rows are timed by llama-batched-bench, which is beside it.

    Args:
        program: llama-bench.
        gguf: the model.
        threads: how many of them compute.
        steps: the tokens of one timing of decode.
        cache: llama.cpp's type of keys and values. Where it is not f16, flash attention is asked for, without which
            llama.cpp does not take other values.
    """

    def __init__(self, program: Path, gguf: Path, threads: int, *, steps: int, cache: str = "f16") -> None:
        self._program = program
        self._gguf = gguf
        self._threads = threads
        self._steps = steps
        self._cache = cache
        self._peak = 0
        self.kernels = f"llama.cpp, keys and values in {cache}"

    def speed(self, timing: Timing) -> float:
        """Tokens per second, of all rows together. Raises H1ExportError where llama.cpp's program fails."""
        words = arguments if timing.batch == 1 else batched_arguments
        command = [
            *words(self._program, self._gguf, self._threads, steps=self._steps, timing=timing),
            *cache_arguments(self._cache),
        ]
        with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
            try:
                _, peak = run_watched(command, "VmHWM", stdout=out)
            except (OSError, CalledProcessError) as error:
                raise H1ExportError(command[0], f"does not run {self._gguf.name} ({error})", "run it by hand") from None
            out.seek(0)
            text = out.read()
        self._peak = max(self._peak, peak)
        if timing.batch > 1:
            return find_batched_speed(text, timing)
        run = find_run(text, timing)
        self.kernels = f"llama.cpp {run['build_commit']}, keys and values in {run['type_k']}"
        return float(run["avg_ts"])

    def finish(self) -> int:
        """Bytes of memory at the largest peak of all runs."""
        return self._peak


def arguments(program: Path, gguf: Path, threads: int, *, steps: int, timing: Timing) -> list[str]:
    """The command line of one run of llama-bench."""
    prompt, generate, depth = (timing.tokens, 0, 0) if timing.phase is Phase.PREFILL else (0, steps, timing.tokens)
    numbers = {"-t": threads, "-p": prompt, "-n": generate, "-d": depth, "-r": 1}
    return [
        str(program),
        "-m",
        str(gguf),
        "-o",
        "json",
        *(word for option, value in numbers.items() for word in (option, str(value))),
    ]


def batched_arguments(program: Path, gguf: Path, threads: int, *, steps: int, timing: Timing) -> list[str]:
    """The command line of one run of llama-batched-bench; its rows have at least one token before."""
    depth = max(1, timing.tokens)
    numbers = {"-t": threads, "-c": timing.batch * (depth + steps), "-npp": depth, "-ntg": steps, "-npl": timing.batch}
    return [
        str(program.with_name("llama-batched-bench")),
        "-m",
        str(gguf),
        "--output-format",
        "jsonl",
        *(word for option, value in numbers.items() for word in (option, str(value))),
    ]


def cache_arguments(cache: str) -> list[str]:
    """What asks llama.cpp's programs for keys and values of a type."""
    return [] if cache == "f16" else ["-ctk", cache, "-ctv", cache, "-fa", "1"]


def find_batched_speed(text: str, timing: Timing) -> float:
    """Tokens per second of all rows together, in llama-batched-bench's lines of JSON.

    Raises:
        H1ExportError: there is no such run in it, or two.
    """
    try:
        runs = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        (run,) = [run for run in runs if run["pl"] == timing.batch]
        return float(run["speed_tg" if timing.phase is Phase.DECODE else "speed_pp"])
    except (ValueError, KeyError, TypeError) as error:
        what = f"its JSON has not one run of {timing.batch} rows ({type(error).__name__}: {error})"
        raise H1ExportError("llama-batched-bench", what, "compare its version with what is read here") from None


def find_run(text: str, timing: Timing) -> dict[str, Any]:
    """The one run for ``timing`` in llama-bench's JSON; ``avg_ts`` is its tokens per second.

    Raises:
        H1ExportError: no such run in it, or two.
    """
    try:
        runs = [run for run in json.loads(text) if (run["n_prompt"] > 0) == (timing.phase is Phase.PREFILL)]
        name = "n_prompt" if timing.phase is Phase.PREFILL else "n_depth"
        (run,) = [run for run in runs if run[name] == timing.tokens]
        return {key: run[key] for key in ("avg_ts", "build_commit", "type_k", "n_threads")}
    except (ValueError, KeyError, TypeError) as error:
        what = f"its JSON has not one run of {timing.phase} {timing.tokens} ({type(error).__name__}: {error})"
        raise H1ExportError("llama-bench", what, "compare its version with what is read here") from None
