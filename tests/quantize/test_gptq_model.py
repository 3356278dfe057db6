"""GPTQ of whole models: better than rounding, the same bytes on any number of threads, and after any kill."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from h1export.artifact.journal import SCRATCH
from h1export.artifact.stage import Stage
from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.tokenizer import scoring_ids
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import EMBEDDING, LM_HEAD
from h1export.progress import SILENT
from h1export.quantize.calibration import Calibration
from h1export.quantize.methods import gptq_model as module
from h1export.quantize.methods import solved_file
from h1export.quantize.methods.gptq import DAMPING
from h1export.quantize.methods.gptq_model import solve_model
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.methods.staged_layer import STOPS
from h1export.quantize.methods.stored import StoredIntegers
from h1export.quantize.scheme import QuantScheme
from h1export.quantize.source import QuantizedWeights, Rounded
from h1export.validate.accuracy.logits import logit_figures
from h1export.validate.accuracy.perplexity import windows
from h1export.validate.accuracy.reference import Reference

SCHEME = QuantScheme("int4", 32, "gptq")
PROXY = Path(__file__).parents[2] / "benchmarks" / "proxy"  # its head is its embedding


def rounded(checkpoint: Path) -> Rounded:
    config = FalconH1Config.load(checkpoint)
    return Rounded(WeightStore.open(checkpoint, config), SCHEME.precisions(config), quantize_rows)


def solved(checkpoint: Path, folder: Path, jobs: int = 1) -> StoredIntegers:
    """On random tokens."""
    config = FalconH1Config.load(checkpoint)
    rest = rounded(checkpoint)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (5, 100))
    folder.mkdir(exist_ok=True)
    return solve_model(rest.store, config, rest, ids=ids, stage=Stage(folder, jobs), progress=SILENT)


def bytes_of(integers: QuantizedWeights, store: WeightStore) -> dict[str, str]:
    """sha256 of each tensor's codes and scales."""
    found = {name: integers.rows(name, 0, store.shape(name)[0]) for name in integers.precisions}
    return {
        name: hashlib.sha256(tensor.codes.tobytes() + tensor.scales.tobytes()).hexdigest()
        for name, tensor in found.items()
    }


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    assert torch.get_num_threads() == count, "the solver leaves torch's threads as they were"
    torch.set_num_threads(before)


def test_threads_change_no_byte(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint("everything")
    found = []
    store = rounded(checkpoint).store
    for jobs, threads in ((1, 1), (3, 1), (2, 2)):
        with torch_threads(threads):
            found.append(bytes_of(solved(checkpoint, tmp_path / f"{jobs}{threads}", jobs), store))
    assert found[0] == found[1] == found[2]


def test_rows_of_the_file_are_rows_of_the_tensor(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    integers = solved(make_checkpoint(), tmp_path / "stage")
    name = "model.layers.1.feed_forward.down_proj.weight"
    whole = integers.rows(name, 0, 128)
    part = integers.rows(name, 40, 57)
    np.testing.assert_array_equal(part.codes, whole.codes[40:57])
    np.testing.assert_array_equal(part.scales, whole.scales[40:57])
    assert part.row_scale.tolist() == [1.0] * 17


@pytest.mark.parametrize("name", ["plain", "tied"])
def test_products_are_solved_and_an_embedding_of_its_own_is_rounded(
    name: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(name)
    rest = rounded(checkpoint)
    integers = solved(checkpoint, tmp_path / "stage")
    plain = bytes_of(rest, rest.store)
    found = bytes_of(integers, rest.store)
    same = {tensor for tensor in plain if plain[tensor] == found[tensor]}
    assert same == ({EMBEDDING} if name == "plain" else set()) | set(integers.guard.plain)
    assert len(same) < len(plain) / 2
    assert (LM_HEAD in found) == (name == "plain")


def mean_kl(
    reference: Reference,
    checkpoint: Path,
    integers: QuantizedWeights,
    windows: list[np.ndarray],
    truths: list[np.ndarray],
) -> float:  # type: ignore[type-arg]
    store = rounded(checkpoint).store
    reference.hold({name: integers.rows(name, 0, store.shape(name)[0]).unfolded() for name in integers.precisions})
    return logit_figures(
        [(reference.full(window[:-1])[0], truth) for window, truth in zip(windows, truths, strict=True)]
    )["kl"]


def share_of_rounding(checkpoint: Path, heldout: str, stage: Path, *, every: int) -> float:
    """Return the divergence of GPTQ over that of rounding to nearest, on every so many windows of ``heldout``."""
    chosen = windows(scoring_ids(checkpoint, heldout)[0])[::every]
    reference = Reference(checkpoint)
    rest = rounded(checkpoint)
    truths = [reference.full(window[:-1])[0] for window in chosen]
    config = FalconH1Config.load(checkpoint)
    ids = Calibration(samples=16).ids(checkpoint)
    found = solve_model(rest.store, config, rest, ids=ids, stage=Stage(stage, 2), progress=SILENT)
    plain, ours = (mean_kl(reference, checkpoint, integers, chosen, truths) for integers in (rest, found))
    return ours / plain


def test_gptq_has_at_most_six_tenths_of_the_divergence_of_rounding(tiny: Path, tmp_path: Path) -> None:
    """On held-out text; the standard error of the ratio over such windows is a twentieth of it.

    The whole text: benchmarks/quality.py.
    """
    assert share_of_rounding(tiny, (tiny / "heldout.txt").read_text(encoding="utf-8"), tmp_path, every=15) < 0.6


@pytest.mark.slow
def test_a_tied_head_stays_a_good_embedding(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that move for the logits' sake alone are poor inputs: they leave half as much again on this model."""
    heldout = (tiny / "heldout.txt").read_text(encoding="utf-8")
    (tmp_path / "logits_alone").mkdir()
    damped = share_of_rounding(PROXY, heldout, tmp_path, every=8)
    assert damped < 0.6
    monkeypatch.setattr(module, "TIED_DAMPING", DAMPING)
    monkeypatch.setattr(solved_file, "is_worse", lambda _: False)  # the guard would keep the plain head
    assert share_of_rounding(PROXY, heldout, tmp_path / "logits_alone", every=8) > 1.4 * damped


def test_the_head_is_solved_on_the_contexts_of_its_tokens(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That saves a tenth of the divergence at least, where the head alone is in integers."""
    ids = scoring_ids(tiny, (tiny / "heldout.txt").read_text(encoding="utf-8"))[0]
    chosen = windows(ids)[::20]
    reference = Reference(tiny)
    truths = [reference.full(window[:-1])[0] for window in chosen]
    config = FalconH1Config.load(tiny)
    store = WeightStore.open(tiny, config)
    rest = Rounded(store, {LM_HEAD: SCHEME.precisions(config)[LM_HEAD]}, quantize_rows)
    found = []
    for share in (module.UNWEIGHTED_SHARE, 1e6):
        monkeypatch.setattr(module, "UNWEIGHTED_SHARE", share)
        folder = tmp_path / str(share)
        folder.mkdir()
        integers = solve_model(
            store, config, rest, ids=Calibration(samples=8).ids(tiny), stage=Stage(folder, 2), progress=SILENT
        )
        found.append(mean_kl(reference, tiny, integers, chosen, truths))
    assert found[0] < 0.9 * found[1]


# Kills builds at OUT in the middle of solving, the n-th call of a function the last; then lets one finish, and counts
# its calls.
KILLS = """
import os, sys
from pathlib import Path
from h1export.commands import build
from h1export.quantize.calibration import Calibration
from h1export.quantize.scheme import QuantScheme
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.quantize.methods import gptq_model as module, solved_file
checkpoint, truth, out = map(Path, sys.argv[1:4])
program = build.trace(FalconH1Config.load(checkpoint), False)
build.trace = lambda *_: program
modules = {"solve_rows": solved_file, "advance": module, "outputs": module}
functions = {name: getattr(place, name) for name, place in modules.items()}
def built(place, name="", last=0):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    calls = {name: 0 for name in functions}
    def counted(own, *arguments, **named):
        calls[own] += 1
        if own == name and calls[own] == last:
            os.kill(os.getpid(), 9)
        return functions[own](*arguments, **named)
    for own in functions:
        setattr(modules[own], own, lambda *arguments, own=own, **named: counted(own, *arguments, **named))
    scheme, calibration = QuantScheme("int4", 32, "gptq"), Calibration(samples=3, length=100)
    build.build_artifact(checkpoint, "ort", place, scheme=scheme, jobs=1, calibration=calibration)
    print(*calls.values(), flush=True)
    os._exit(0)
assert built(truth) == 0
first = ("advance", 2), ("solve_rows", 4), ("advance", 8), ("outputs", 2)
for name, last in (*first, ("solve_rows", 4), ("solve_rows", 8), ("solve_rows", 2)):
    assert built(out, name, last) == 9, (name, last)
assert built(out) == 0
"""


@pytest.mark.ort
@pytest.mark.slow
def test_kills_change_no_byte(spoken_checkpoint: Path, tmp_path: Path) -> None:
    """Whole builds: also that nothing of the solver's work is in an artifact."""
    truth = tmp_path / "truth"
    out = tmp_path / "out"
    words = [sys.executable, "-c", KILLS, str(spoken_checkpoint), str(truth), str(out)]
    run = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    first, last = (tuple(map(int, line.split())) for line in run.stdout.splitlines())
    groups = first[0] - 2 * 9
    assert first[1:] == (3 * 2 * len(STOPS), 3 * 2)  # three sequences through two layers, once
    assert groups > 1
    assert last == (groups, 0, 0)  # the head alone
    names = sorted(path.name for path in truth.iterdir())
    assert names == sorted(path.name for path in out.iterdir())
    assert SCRATCH not in names
    assert all((out / name).read_bytes() == (truth / name).read_bytes() for name in names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "truth"]
