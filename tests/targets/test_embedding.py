"""--embedding on every target: what is stored, what it computes, and the one line where a target cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runner_errors import worst

from h1export.artifact.artifact import Artifact
from h1export.cli import run
from h1export.commands.build import BuildJob
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.tensors import EMBEDDING
from h1export.quantize.calibration import Calibration
from h1export.quantize.choices import OF_EMBEDDING
from h1export.quantize.scheme import QuantScheme
from h1export.targets import options_class, target_infos
from h1export.targets.options import option_fields
from h1export.validate.accuracy.reference import Reference

Build = Callable[..., Artifact]
SHAPE = {"num_hidden_layers": 1, "mamba_d_state": 32}
CALLS = (20, 1)
BITS = {"int4": 4, "int8": 8, "fp16": None}
EXACT = 1e-5  # of the range
HALF = 5e-3
# (target, its options, the largest error); floats of fp16 beside activations in fp32 are not possible on some targets
COMPUTED: list[tuple[str, dict[str, Any], float]] = [
    ("ort", {"graph": "cpu"}, EXACT),
    ("ort", {"graph": "portable"}, EXACT),
    ("ort", {"graph": "wasm"}, EXACT),
    ("gguf", {}, EXACT),
    ("mlx", {"compute": "fp32"}, EXACT),
    ("gptq", {}, EXACT),
    ("coreml", {"compute": "fp32", "max_context": 96, "state_io": True}, EXACT),
]


def rows() -> list[Any]:
    return [
        pytest.param(
            *row, tied, embedding, marks=getattr(pytest.mark, row[0]), id=f"{row[0]}-{place}-{tied}-{embedding}"
        )
        for place, row in enumerate(COMPUTED)
        for tied in (False, True)
        for embedding in choices_of(row[0])
        if embedding in BITS
    ]


def choices_of(target: str) -> tuple[str, ...]:
    (found,) = (field.choices for field in option_fields(options_class(target)) if field.name == "embedding")
    return found


@pytest.mark.parametrize(("target", "options", "limit", "tied", "embedding"), rows())
def test_it_is_stored_so_and_computes_so(
    target: str,
    options: dict[str, Any],
    limit: float,
    tied: bool,
    embedding: str,
    make_checkpoint: Callable[..., Path],
    build: Build,
) -> None:
    checkpoint = make_checkpoint(tie_word_embeddings=tied, **SHAPE)
    if embedding == "fp16" and options.get("compute") == "fp32":
        options = options | {"compute": "fp16"}
        limit = HALF
    artifact = build(checkpoint, "int4", target=target, embedding=embedding, **options)
    stored = {part.tensor: weight.bits for weight in artifact.manifest.weights for part in weight.parts}
    assert stored.get(EMBEDDING) == BITS[embedding]
    runner: Any = load_runner(artifact, 1, target == "gguf")
    reference = Reference(checkpoint)
    reference.hold({**runner.stored_weights(), **(runner.stored_floats() if target == "gguf" else {})})
    assert max(worst(runner, reference, CALLS)) <= limit


@pytest.mark.ort
@pytest.mark.parametrize("graph", ["cpu", "portable", "wasm", "cuda"])
def test_an_embedding_in_fp16_has_two_bytes_a_value(
    graph: str, make_checkpoint: Callable[..., Path], build: Build
) -> None:
    """Written once, however many graphs read it."""
    checkpoint = make_checkpoint(**SHAPE)
    sizes = [
        sum(size for name, (_, size) in artifact.manifest.files.items() if name.endswith(".data"))
        for artifact in (build(checkpoint, "int4", graph=graph, embedding=e) for e in ("fp16", "int8"))
    ]
    table = Reference(checkpoint).config.vocab_size * Reference(checkpoint).config.hidden_size
    assert sizes[0] - sizes[1] == pytest.approx(table, rel=0.2)


@pytest.mark.parametrize("target", sorted(target_infos()))
def test_every_target_says_what_it_takes(target: str) -> None:
    (field,) = (field for field in option_fields(options_class(target)) if field.name == "embedding")
    assert field.choices[0] == field.default == "auto"
    assert "fp16" in field.choices
    assert field.later


REFUSED = [
    ("gptq", False, ["--embedding", "int8"], "--embedding: cannot be 'int8' for --target gptq; give auto or fp16"),
    ("ort", False, ["--embedding", "q6_k"], "--embedding: cannot be 'q6_k' for --target ort"),
    ("trt", True, ["--embedding", "int8"], "--embedding: int8 is for an embedding that is not the head"),
    ("trt", False, ["--embedding", "fp16", "--compute", "bf16"], "--embedding: fp16 is not the dtype in which"),
    ("mlx", False, ["--embedding", "fp16", "--compute", "fp32"], "--embedding: fp16 is not the dtype in which"),
    ("coreml", False, ["--embedding", "fp16", "--compute", "fp32"], "--embedding: fp16 is not the dtype in which"),
    ("gguf", True, ["--embedding", "int8", "--head", "q8_0"], "--head, --embedding: name one tensor"),
    ("ort", False, ["--graph", "cuda", "--activations", "bf16", "--embedding", "fp16"], "--embedding: fp16 is not"),
]


@pytest.mark.parametrize(("target", "tied", "words", "message"), REFUSED, ids=range(len(REFUSED)))
def test_a_target_that_cannot_says_so_before_any_work(
    target: str,
    tied: bool,
    words: list[str],
    message: str,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("h1export.checkpoint.store.WeightStore.open", None)  # nothing of the weights is looked at
    out = tmp_path / "out"
    checkpoint = str(make_checkpoint(tie_word_embeddings=tied, **SHAPE))
    assert run(["build", checkpoint, "--target", target, *words, "--out", str(out), "--quiet"]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("embedding", OF_EMBEDDING)
@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_the_option_comes_before_a_plan(quant: Any, embedding: str, make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = make_checkpoint(**SHAPE)
    own = options_class("mlx")(embedding=embedding)  # type: ignore[call-arg]
    scheme = QuantScheme(quant, chosen={EMBEDDING: "int8"})
    job = BuildJob.open(checkpoint, "mlx", scheme=scheme, options=own, calibration=Calibration())
    found = job.integers.precisions.get(EMBEDDING)
    assert (None if found is None else found.bits) == BITS[embedding]
    assert job.manifest("").scheme["chosen"] == {EMBEDDING: OF_EMBEDDING[embedding]}


def test_a_graph_in_bf16_has_no_table_in_fp16() -> None:
    with pytest.raises(H1ExportError, match=r"--embedding: fp16 is not a dtype that --activations bf16 stores"):
        options_class("ort")(graph="cuda", activations="bf16", embedding="fp16")  # type: ignore[call-arg]
