"""Ready-made integers whose scales are subnormal: our kernels compute what they mean, and validate sees it if not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gptq_files import Written, edit

from h1export.artifact.artifact import Artifact
from h1export.commands.build import build_artifact
from h1export.commands.load import load_runner
from h1export.progress import SILENT
from h1export.quantize.scheme import QuantScheme
from h1export.report.checks import CheckKind
from h1export.report.report import Report, Verdict
from h1export.targets.onnxruntime import kernel_build, native_library
from h1export.targets.onnxruntime.options import OrtOptions
from h1export.validate.accuracy.logits import relative_error
from h1export.validate.accuracy.run import ValidateOptions, validate

IDS = np.random.default_rng(0).integers(0, 264, 24, dtype=np.int64)
EXACT = 1e-5  # of the range: float32 against float32
MODULE = "down_proj"
# a reading of every scale as a normal float16, which makes 2^-24 to 2^-15
PLANTED = (
    ("#define H1_F16C 1", "#define H1_NO_F16C 1"),
    ("magnitude < kNormal ? small : normal", "magnitude < 0 ? small : normal"),
)


@pytest.fixture(scope="module")
def subnormal(make_gptq: Callable[..., Written], tmp_path_factory: pytest.TempPathFactory) -> tuple[Written, Artifact]:
    """A checkpoint in GPTQ format, one of whose matrices has every subnormal scale, and its artifact."""
    folder = tmp_path_factory.mktemp("subnormal")
    written = make_gptq(folder / "in")

    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith(f"{MODULE}.scales")]:
            shape = tensors[name].shape
            bits = 1 + np.arange(np.prod(shape)) % 1023
            tensors[name] = bits.astype(np.uint16).view(np.float16).reshape(shape)
            written.scales[name.replace(".scales", ".weight")][:] = tensors[name].T

    edit(written.folder, change)
    artifact = build_artifact(
        written.folder,
        "ort",
        folder / "out",
        scheme=QuantScheme("none"),
        options=OrtOptions(accuracy_level=0, kv="fp32"),
    )
    return written, artifact


def judged(written: Written, artifact: Artifact) -> Report:
    exact = load_runner(artifact, float32=True, kernels="native")
    return validate(
        artifact, exact, exact, checkpoint=written.folder, options=ValidateOptions(pairs=0), progress=SILENT
    )


def test_logits_are_those_of_the_writers_weights(
    subnormal: tuple[Written, Artifact], gptq_logits: Callable[..., Any]
) -> None:
    written, artifact = subnormal
    runner = load_runner(artifact, kernels="native")
    logits, _ = runner.step(IDS[None], np.ones((1, len(IDS)), np.int64), runner.initial(1))
    assert relative_error(logits[0], gptq_logits(written, IDS)) < EXACT


@pytest.mark.slow
def test_validate_catches_kernels_that_read_them_as_normal(
    subnormal: tuple[Written, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, artifact = subnormal
    assert judged(written, artifact).passed
    csrc = Path(shutil.copytree(kernel_build.FOLDER / "csrc", tmp_path / "csrc"))
    text = (csrc / "simd.h").read_text()
    for right, wrong in PLANTED:
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    (csrc / "simd.h").write_text(text)
    monkeypatch.setattr(native_library, "SOURCES", tuple(csrc / file.name for file in native_library.SOURCES))
    monkeypatch.setattr(native_library, "HEADERS", (csrc / "simd.h", *native_library.HEADERS))
    planted = native_library.compiled(("-O1",))
    monkeypatch.setattr(native_library, "library", lambda: planted)
    report = judged(written, artifact)
    assert not report.passed
    failed = {row.kind for row in report.rows if row.verdict is Verdict.FAIL}
    assert CheckKind.CASE in failed
