"""The command line of llama-bench, and the parser of its results."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from h1export.errors import H1ExportError
from h1export.report.checks import Phase
from h1export.validate.speed.worker import Timing

DECODE = Timing(Phase.DECODE, 2048)
PREFILL = Timing(Phase.PREFILL, 512)
# two runs as build 1 of commit 0c1e570 printed them, without the keys that nothing reads
SAMPLE: list[dict[str, Any]] = [
    {
        "build_commit": "0c1e570",
        "model_type": "falcon-h1 0.5B Q4_0",
        "n_threads": 2,
        "type_k": "f16",
        "n_prompt": 512,
        "n_gen": 0,
        "n_depth": 0,
        "avg_ns": 3537235140,
        "avg_ts": 144.765007,
        "samples_ts": [146.432, 143.098],
    },
    {
        "build_commit": "0c1e570",
        "model_type": "falcon-h1 0.5B Q4_0",
        "n_threads": 2,
        "type_k": "f16",
        "n_prompt": 0,
        "n_gen": 64,
        "n_depth": 2048,
        "avg_ns": 3594000000,
        "avg_ts": 17.807,
        "samples_ts": [8.7, 26.9],
    },
]


@pytest.fixture
def llama_bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/llama_bench.py, which like every script there finds its neighbours beside it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import llama_bench

    return llama_bench


def test_the_run_that_was_asked_for_is_read(llama_bench: ModuleType) -> None:
    text = json.dumps(SAMPLE)
    assert llama_bench.find_run(text, PREFILL)["avg_ts"] == 144.765007
    assert llama_bench.find_run(text, DECODE) == {
        "avg_ts": 17.807,
        "build_commit": "0c1e570",
        "type_k": "f16",
        "n_threads": 2,
    }


@pytest.mark.parametrize(
    ("text", "timing"),
    [
        ("", DECODE),
        ("{}", DECODE),
        ("[1]", DECODE),
        (json.dumps(SAMPLE), Timing(Phase.DECODE, 0)),
        (json.dumps(SAMPLE), Timing(Phase.PREFILL, 2048)),
        (json.dumps(SAMPLE * 2), DECODE),
        (json.dumps([{**SAMPLE[1], "avg_ts": None} | {"n_depth": "2048"}]), DECODE),
    ],
)
def test_anything_else_is_refused(llama_bench: ModuleType, text: str, timing: Timing) -> None:
    with pytest.raises(H1ExportError, match="has not one run of"):
        llama_bench.find_run(text, timing)


def test_a_timing_is_one_run_of_the_program(llama_bench: ModuleType, tmp_path: Path) -> None:
    program = tmp_path / "llama-bench"
    program.write_text(f"#!/bin/sh\necho \"$@\" > '{tmp_path}/words'\ncat <<'EOF'\n{json.dumps(SAMPLE)}\nEOF\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    peer = llama_bench.LlamaBench(program, tmp_path / "m.gguf", threads=2, steps=64)
    assert peer.speed(DECODE) == 17.807
    assert (
        tmp_path / "words"
    ).read_text().split() == f"-m {tmp_path}/m.gguf -o json -t 2 -p 0 -n 64 -d 2048 -r 1".split()
    assert peer.speed(PREFILL) == 144.765007
    assert (tmp_path / "words").read_text().split()[4:] == ["-t", "2", "-p", "512", "-n", "0", "-d", "0", "-r", "1"]
    assert "0c1e570" in peer.kernels
    program.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(H1ExportError, match=r"does not run m\.gguf"):
        peer.speed(DECODE)


# what llama-batched-bench of the same commit printed, without the keys that nothing reads
BATCHED = """
{"n_kv_max": 2048, "n_threads": 2, "pp": 1, "tg": 8, "pl": 8, "n_kv": 72, "speed_pp": 54.833580, "speed_tg": 55.505157}
"""


def test_several_rows_are_read_from_the_batched_bench(llama_bench: ModuleType) -> None:
    assert llama_bench.find_batched_speed(BATCHED, Timing(Phase.DECODE, 0, 8)) == 55.505157
    assert llama_bench.find_batched_speed(BATCHED, Timing(Phase.PREFILL, 1, 8)) == 54.83358


@pytest.mark.parametrize("text", ["", BATCHED * 2, BATCHED.replace("speed_tg", "tokens"), "{"])
def test_another_batched_output_is_an_error(llama_bench: ModuleType, text: str) -> None:
    with pytest.raises(H1ExportError, match="not one run of 8 rows"):
        llama_bench.find_batched_speed(text, Timing(Phase.DECODE, 0, 8))


def test_rows_and_caches_reach_the_command(llama_bench: ModuleType) -> None:
    words = llama_bench.batched_arguments(
        Path("bin/llama-bench"), Path("m.gguf"), 2, steps=32, timing=Timing(Phase.DECODE, 0, 8)
    )
    assert words[0] == "bin/llama-batched-bench"
    options = dict(zip(words[words.index("-t") :: 2], words[words.index("-t") + 1 :: 2], strict=True))
    assert options == {"-t": "2", "-c": "264", "-npp": "1", "-ntg": "32", "-npl": "8"}
    assert llama_bench.cache_arguments("f16") == []
    assert llama_bench.cache_arguments("q8_0") == ["-ctk", "q8_0", "-ctv", "q8_0", "-fa", "1"]
