"""The commands that write files: what each is given, and what is there before."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from faults import model
from faults.forked import Ended, Work, command, ran
from h1export.artifact.artifact import REPORT
from h1export.artifact.files import PAGE
from h1export.artifact.signature import SIGNATURE

OUT = "out"
QUICK = ("--method", "rtn", "--jobs", "1", "--quiet")
BUILDS = {
    "ort": (),
    "coreml": (),
    "trt": ("--runtime", "tensorrt", "--sm", "89"),
    "gguf": (),
    "gptq": ("--group-size", "32"),
    "mlx": ("--group-size", "32"),
}
GATES = """
baseline = "gates.baseline.json"

[[gate]]
target = "ort"
quant = "int4"
bytes = 1.01
"""


def nothing(place: Path) -> None:
    """Leave ``place`` empty."""


@dataclass(frozen=True)
class Case:
    """A command that writes below a folder, its place.

    Attributes:
        name: what is written.
        words: the command line for a place.
        before: puts into a place what is there before.
        stdin: what is typed.
        stable: whether each run writes the same bytes; reports hold times.
        does: what is done in the place of a command line.
        may_finish: whether an error may leave the whole result, such as an entry of a cache.
    """

    name: str
    words: Callable[[Path], Sequence[str]]
    before: Callable[[Path], None] = nothing
    stdin: str = ""
    stable: bool = True
    does: Callable[[Path], int] | None = None
    may_finish: bool = False

    def work(self, place: Path) -> Work:
        """Return what is done at a place."""
        if self.does is not None:
            return partial(self.does, place)
        return command(self.words(place))


@dataclass(frozen=True)
class Inputs:
    """What the commands are given; all of it lies outside their places.

    Attributes:
        scratch: a folder.
        checkpoint: a small model.
        artifact: an int4 artifact of it for ONNX Runtime, with a report.
        key: a private key.
    """

    scratch: Path
    checkpoint: Path
    artifact: Path
    key: Path

    @classmethod
    def make(cls, scratch: Path, run: Callable[[Sequence[str]], int]) -> Inputs:
        """Make all of it in ``scratch``; ``run`` runs the command line, in this process."""
        checkpoint = model.make(scratch / "checkpoint")
        artifact = scratch / "artifact"
        key = scratch / "key.pem"
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(key)], check=True)
        built = run(("build", str(checkpoint), "--target", "ort", *QUICK, "--out", str(artifact)))
        judged = ran(("validate", str(artifact), str(checkpoint), "--quick", "--quiet", *STOCK), scratch)
        if built != 0 or judged.code not in (0, 1):
            raise RuntimeError(f"a build or a validation fails without a fault: {judged.error}")
        return cls(scratch, checkpoint, artifact, key)


STOCK = ("--kernels", "stock")


def must(words: Sequence[str], scratch: Path) -> Ended:
    """Run a command that has to succeed."""
    ended = ran(words, scratch)
    if ended.code != 0:
        raise RuntimeError(f"{' '.join(words)}: exit code {ended.code}\n{ended.error}")
    return ended


def build(inputs: Inputs, target: str, *more: str, force: bool = False) -> Case:
    """Return the case of a build for ``target``; with ``force``, over an artifact of another precision."""
    words = ("build", str(inputs.checkpoint), "--target", target, *QUICK, *BUILDS[target], *more)
    old = inputs.scratch / f"old-{target}"

    def before(place: Path) -> None:
        if not force:
            return
        if not old.exists():
            must(
                (
                    "build",
                    str(inputs.checkpoint),
                    "--target",
                    target,
                    *QUICK,
                    *BUILDS[target],
                    "--quant",
                    "none",
                    "--out",
                    str(old),
                ),
                inputs.scratch,
            )
        shutil.copytree(old, place / OUT)

    return Case(
        f"build {target}{' ' + ' '.join(more) if more else ''}{' --force' if force else ''}",
        lambda place: (*words, *(("--force",) if force else ()), "--out", str(place / OUT)),
        before,
    )


def others(inputs: Inputs) -> list[Case]:
    """Return the cases of the commands that write beside a build."""
    checkpoint = str(inputs.checkpoint)

    def artifact(place: Path) -> None:
        shutil.copytree(inputs.artifact, place / OUT)
        (place / OUT / PAGE).write_text("an older page", "utf-8")
        (place / OUT / SIGNATURE).write_bytes(bytes(64))

    def gated(place: Path) -> None:
        (place / "gates.toml").write_text(GATES, "utf-8")
        (place / "gates.baseline.json").write_text('{"format": 1, "gates": {}}\n', "utf-8")

    def older(*names: str) -> Callable[[Path], None]:
        def before(place: Path) -> None:
            for name in names:
                (place / name).write_text("older", "utf-8")

        return before

    gate = ("gate", str(inputs.artifact), checkpoint, "--quiet", *STOCK)
    return [
        Case(
            f"validate ({REPORT})",
            lambda place: ("validate", str(place / OUT), checkpoint, "--quick", "--quiet", *STOCK),
            artifact,
            stable=False,
        ),
        Case(f"report ({PAGE})", lambda place: ("report", str(place / OUT), "--quiet"), artifact),
        Case(
            "report --to",
            lambda place: ("report", str(inputs.artifact), "--to", str(place / "p.html"), "--quiet"),
            older("p.html"),
        ),
        Case(f"sign ({SIGNATURE})", lambda place: ("sign", str(place / OUT), "--key", str(inputs.key)), artifact),
        Case(
            "gate --write-baseline",
            lambda place: (*gate, "--gates", str(place / "gates.toml"), "--write-baseline"),
            gated,
        ),
        Case(
            "sensitivity --out",
            lambda place: ("sensitivity", checkpoint, "--jobs", "1", "--quiet", "--out", str(place / "plan.yaml")),
            older("plan.yaml"),
        ),
        Case(
            "doctor --out",
            lambda place: ("doctor", str(inputs.artifact), checkpoint, "--quiet", "--out", str(place / "d.json")),
            older("d.json", "d.md"),
            stable=False,
        ),
        Case(
            "chat, /save",
            lambda place: ("chat", str(inputs.artifact), "--quiet", "--max-tokens", "2", *STOCK),
            stdin="hello\n/save {place}/talk.safetensors\n",
        ),
        Case("plan", lambda place: ("plan", checkpoint, "--target", "ort", "--method", "rtn", "--json")),
    ]


def coreml_run(inputs: Inputs) -> Case:
    """Return the case of `coreml run --out`, with an artifact for CoreML."""
    artifact = inputs.scratch / "coreml"
    words = ("build", str(inputs.checkpoint), "--target", "coreml", *QUICK, "--out", str(artifact))
    must(words, inputs.scratch)
    from h1export.targets.coreml.evaluator import Evaluator, Package
    from h1export.targets.coreml.evaluator.evaluator import _shape_and_dtype
    from h1export.targets.coreml.program.layout import PACKAGE

    evaluator = Evaluator(Package.open(artifact / PACKAGE), "decode")
    given = inputs.scratch / "inputs.npz"
    np.savez(given, **{name: np.zeros(*_shape_and_dtype(kind)) for name, kind in evaluator.function.inputs.items()})
    call = ("coreml", "run", str(artifact), "--function", "decode", "--inputs", str(given), "--quiet")
    return Case("coreml run --out", lambda place: (*call, "--out", str(place / "after.npz")))
