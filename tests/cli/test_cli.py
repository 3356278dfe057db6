"""The command line of a user: answers on standard output, one line for every mistake, exit codes as documented."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.tokenizer import load_tokenizer
from h1export.cli import run
from h1export.commands.load import load_runner
from h1export.runtime.generation import Sampling, generate
from h1export.targets.onnx import sdk

pytestmark = pytest.mark.ort
Build = Callable[..., Artifact]
QUICK = ["--latency-pairs", "0", "--text-bytes", "500", "--prompts", "0"]


@pytest.fixture(scope="module")
def built(tiny: Path, build: Build) -> str:
    """An int4 artifact of the embedded model, as the CLI makes it by default."""
    return str(build(tiny, "int4", accuracy_level=4).folder)


def test_build_and_validate_the_embedded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["build", "--target", "ort", "--quant", "int4", "--validate", *QUICK]) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert "PASSED" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny-ort-int4"]
    assert json.loads((tmp_path / "tiny-ort-int4" / "report.json").read_text())["passed"] is True
    Artifact.open(tmp_path / "tiny-ort-int4").check_hashes()


def test_build_json_is_pure(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a" / "b"
    assert (
        run(
            [
                "build",
                str(make_checkpoint()),
                "--target",
                "ort",
                "--quant",
                "int8",
                "--out",
                str(out),
                "--json",
                "--validate",
                *QUICK,
            ]
        )
        == 0
    )
    stdout, stderr = capfd.readouterr()
    (answer,) = json.loads(stdout)
    assert answer["target"] == "ort"
    assert answer["report"]["passed"] is True
    assert answer["bytes"] == sum(answer["files"].values())
    assert stderr == ""


def test_a_failed_gate_is_exit_code_1(built: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", built, "--tolerance", "drift.logits=1e-9", "--quick"]) == 1
    assert "FAILED" in capfd.readouterr().err
    assert run(["validate", built, "--json", *QUICK]) == 0
    assert json.loads(capfd.readouterr().out)["passed"] is True


def test_generate_streams_what_the_library_generates(built: str, capfd: pytest.CaptureFixture[str]) -> None:
    artifact = Artifact.open(Path(built))
    tokenizer = load_tokenizer(artifact.folder)
    runner = load_runner(artifact)
    prompt = np.array(tokenizer.encode("import os", add_special_tokens=False).ids, np.int64)
    expected = tokenizer.decode(
        list(generate(runner, prompt, 12, sampling=Sampling(), eos=frozenset(artifact.config.eos_token_ids)))
    )
    assert run(["generate", built, "import os", "--max-tokens", "12"]) == 0
    assert capfd.readouterr().out == expected + "\n"


def test_generate_says_that_it_runs_slower_than_it_could(
    built: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for options, said in (((), True), (("--quiet",), False), (("--kernels", "stock"), False)):
        assert run(["generate", built, "import os", "--max-tokens", "2", *options]) == 0
        assert ("no-such-compiler" in capfd.readouterr().err) == said


def test_sampling_is_reproducible_by_seed(built: str, capfd: pytest.CaptureFixture[str]) -> None:
    def sample(*options: str) -> str:
        assert run(["generate", built, "def f(", "--max-tokens", "16", "--temperature", "1.0", "--json", *options]) == 0
        return str(json.loads(capfd.readouterr().out)["text"])

    assert sample("--seed", "1") == sample("--seed", "1")
    assert len({sample("--seed", str(seed)) for seed in range(4)}) > 1
    assert sample("--seed", "1", "--top-k", "1") == sample("--seed", "2", "--top-k", "1")
    assert sample("--seed", "1", "--top-p", "1e-6") == sample("--seed", "2", "--top-k", "1")


def test_chat_uses_the_template(built: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", built, "Write the module heapq.", "--chat", "--max-tokens", "8", "--json"]) == 0
    chat = json.loads(capfd.readouterr().out)["text"]
    assert run(["generate", built, "Write the module heapq.", "--max-tokens", "8", "--json"]) == 0
    assert chat != json.loads(capfd.readouterr().out)["text"]


def test_inspect_a_checkpoint_and_an_artifact(built: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "--json"]) == 0
    checkpoint = json.loads(capfd.readouterr().out)
    assert checkpoint["kind"] == "checkpoint"
    assert checkpoint["config"]["mamba_n_groups"] == 2
    assert run(["inspect", built, "--json"]) == 0
    artifact = json.loads(capfd.readouterr().out)
    assert artifact["kind"] == "artifact"
    assert artifact["hashes"] == "verified"
    for words in (["inspect"], ["inspect", built]):
        assert run(words) == 0
        assert "mamba_n_groups" in capfd.readouterr().out


def test_inspect_sees_a_changed_file(built: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (copy / "model.onnx.data").write_bytes(bytes(data))
    assert run(["inspect", str(copy)]) == 2
    assert "was changed after the build" in capfd.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    assert "_H1EXPORT_COMPLETE" in capfd.readouterr().out


@pytest.mark.parametrize(
    "command", [[], ["build"], ["validate"], ["generate"], ["inspect"], ["bench"], ["gate"], ["completion"]]
)
def test_help_has_text(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*command, "--help"]) == 0
    assert len(capfd.readouterr().out) > 150


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def escape(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../../etc/passwd.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()  # the index beside it would not be read


def oversize_header(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[:8] = (1 << 40).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(bytes(data))


def overlap(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first, second = sorted(
        (name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"]
    )[:2]
    size = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    start = header[first]["data_offsets"][0]
    header[second]["data_offsets"] = [start, start + size]
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def poison(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-2] + b"\xc0\x7f")  # the last weight becomes a bf16 NaN


def cut_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "truncated, download it again"),
    "oversized header": (oversize_header, "and at most 4194304 are read"),
    "overlapping offsets": (overlap, "starts at byte"),
    "wrong shapes": (lambda folder: edit_config(folder, intermediate_size=256), "config.json asks for"),
    "extra layers": (lambda folder: edit_config(folder, num_hidden_layers=1), "has no place"),
    "missing layers": (lambda folder: edit_config(folder, num_hidden_layers=3), "is missing"),
    "NaN in config": (lambda folder: edit_config(folder, key_multiplier=float("nan")), "'key_multiplier' is nan"),
    "NaN in weights": (poison, "not finite"),
    "pickle": (to_pickle, "pickle"),
    "shard path escape": (escape, "own folder"),
    "remote code": (lambda folder: edit_config(folder, auto_map={"AutoConfig": "x.py"}), "remote code"),
    "another model": (lambda folder: edit_config(folder, model_type="llama"), "'llama'"),
    "config is not JSON": (cut_config, "not readable as JSON"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no such file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoints_give_one_line_and_nothing_else(
    name: str, copy_checkpoint: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, says = HOSTILE[name]
    folder = copy_checkpoint()
    damage(folder)
    place = tmp_path / "place"
    assert run(["build", str(folder), "--target", "ort", "--method", "rtn", "--out", str(place / "out")]) == 2
    assert_one_line(capfd, says)
    assert not place.exists() or not list(place.iterdir())


def test_nan_weights_are_refused_in_float32_too(
    copy_checkpoint: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copy_checkpoint()
    poison(folder)
    assert (
        run(["build", str(folder), "--target", "ort", "--quant", "none", "--out", str(tmp_path / "place" / "out")]) == 2
    )
    assert_one_line(capfd, "not finite")
    assert not list((tmp_path / "place").iterdir())


def test_a_width_that_no_block_divides_names_tensor_and_way_out(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint(hidden_size=100, num_attention_heads=2)
    assert run(["build", str(checkpoint), "--target", "ort", "--out", str(tmp_path / "out")]) == 2
    assert_one_line(capfd, "has 100 columns, which groups of 32 do not divide; use --quant int8")
    assert not list(tmp_path.iterdir())


def assert_one_line(capfd: pytest.CaptureFixture[str], says: str) -> None:
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("h1export: ")
    assert err.count("\n") == 1
    assert says in err
    assert "Traceback" not in err
    assert "internal error" not in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["build", "/no/such/folder", "--target", "ort"], "no such folder"),
        (["build", "some-org/some-model", "--target", "ort"], "cannot be reached"),
        (["build", "a/b/c", "--target", "ort"], "no such folder"),
        (["build", "--target", "ort", "--accuracy-level", "3", "--out", "OUT"], "not a level"),
        (["validate", "/no/such/artifact"], "no manifest.json"),
        (["validate", "BUILT", "--tolerance", "nonsense=1"], "is no metric"),
        (["validate", "BUILT", "--tolerance", "drift.logits"], "METRIC=VALUE"),
        (["generate", "BUILT", "x", "--temperature", "-1"], "temperature"),
        (["generate", "BUILT", "x", "--top-p", "0"], "top-p"),
        (["generate", "BUILT", ""], "has no tokens"),
        (["generate", "BUILT", "x " * 9000], "context"),
        (["inspect", "/no/such"], "no such folder"),
    ],
)
def test_mistakes_give_one_line(
    words: list[str],
    says: str,
    built: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place = {"BUILT": built, "OUT": str(tmp_path / "out")}
    assert run([place.get(word, word) for word in words]) == 2
    assert_one_line(capfd, says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["build"],
        ["build", "--target", "trt2"],
        ["generate"],
        ["nonsense"],
        ["build", "--target", "ort", "--quant", "int3"],
    ],
)
def test_usage_errors_are_exit_code_2(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 2
    assert "Error:" in capfd.readouterr().err


def test_an_existing_out_is_left_alone_without_force(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    words = ["build", str(make_checkpoint()), "--target", "ort", "--out", str(out)]
    for extra, says in (([], "--force"), (["--force"], "not an artifact of h1export")):
        assert run([*words, *extra]) == 2
        assert_one_line(capfd, says)
        assert (out / "precious.txt").read_text() == "mine"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_debug_shows_the_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "/no/such", "--debug"]) == 2
    assert "Traceback" in capfd.readouterr().err


def test_the_graph_for_any_runtime(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert (
        run(["build", "--target", "ort", "--graph", "portable", "--method", "rtn", "--out", out, "--validate", *QUICK])
        == 0
    )
    assert "PASSED" in capfd.readouterr().err
    assert Artifact.open(Path(out)).manifest.options["graph"] == "portable"


def test_the_graph_for_cuda_is_built_anywhere_and_runs_on_cuda_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    monkeypatch.setattr(sdk.onnxruntime(), "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert run(["build", "--target", "ort", "--graph", "cuda", "--method", "rtn", "--out", out]) == 0
    assert Artifact.open(Path(out)).manifest.options["accuracy_level"] == 0
    for command in (["validate", out, *QUICK], ["generate", out, "import"]):
        assert run(command) == 2
        assert "CUDAExecutionProvider: this onnxruntime does not have it" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--graph", "cuda", "--accuracy-level", "4"],
            "--accuracy-level: 4 is not a level that the kernels of --graph cuda have",
        ),
    ],
)
def test_graphs_that_contradict_themselves_are_refused(
    options: list[str], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", "--target", "ort", *options, "--out", str(tmp_path / "out")]) == 2
    assert says in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_bench_against_another_artifact(
    built: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ["bench", built, "--depth", "8", "--prefill", "16", "--threads", "1", "--repeats", "1"]
    assert run([*words, "--json"]) == 0
    out, err = capfd.readouterr()
    answer = json.loads(out)
    assert err == ""
    assert [(speed["phase"], speed["tokens"]) for speed in answer["speeds"]] == [("decode", 8), ("prefill", 16)]
    assert run([*words, "--against", built]) == 0
    out, err = capfd.readouterr()
    assert out == ""
    for words_shown in (
        "accuracy_level 4",
        "quant int4",
        "group_size 32",
        "onnxruntime",
        "decode at 8",
        "of bandwidth",
        "ratio",
    ):
        assert words_shown in err
    assert run(["bench", str(Path(built).parent)]) == 2
    assert "no manifest.json" in capfd.readouterr().err
