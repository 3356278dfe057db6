"""Calibration texts: what is taken, what is refused, what the manifest says of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from h1export.checkpoint.tokenizer import load_tokenizer
from h1export.cli import run
from h1export.errors import H1ExportError
from h1export.quantize.calibration import SHIPPED, Calibration
from h1export.quantize.device import ComputeDevice
from h1export.quantize.scheme import QuantScheme


def test_samples_are_pieces_of_the_text_and_do_not_overlap(tiny: Path) -> None:
    found = Calibration(samples=6, length=40, seed=3).ids(tiny)
    assert found.shape == (6, 40)
    tokens = load_tokenizer(tiny).encode((tiny / SHIPPED).read_text(encoding="utf-8"), add_special_tokens=False).ids
    places = [
        start
        for start in range(0, len(tokens), 40)
        if any(tokens[start : start + 40] == list(sample) for sample in found)
    ]
    assert len(places) == 6
    np.testing.assert_array_equal(found, Calibration(samples=6, length=40, seed=3).ids(tiny))
    assert not np.array_equal(found, Calibration(samples=6, length=40, seed=4).ids(tiny))


def test_the_shipped_text_is_none_of_the_held_out(tiny: Path) -> None:
    """No line of it that says something."""
    held = {line.strip() for line in (tiny / "heldout.txt").read_text(encoding="utf-8").splitlines()}
    lines = [line.strip() for line in (tiny / SHIPPED).read_text(encoding="utf-8").splitlines()]
    shared = [line for line in lines if line in held and len(line) > 50]
    assert len(shared) <= len(lines) / 500, shared


def test_lines_of_json_are_texts(tiny: Path, tmp_path: Path) -> None:
    words = ["import os\n", "def main(argv):\n"] * 60
    (tmp_path / "a.txt").write_text("".join(words), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": word, "id": 1}) + "\n\n" for word in words), encoding="utf-8"
    )
    plain, lines = (Calibration(tmp_path / name, 2, 20).ids(tiny) for name in ("a.txt", "a.jsonl"))
    np.testing.assert_array_equal(plain, lines)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"import os", "has 2 tokens, enough for 0 samples of 20, and 2 are requested; give a longer text"),
        ("a.txt", b"", "has 0 tokens"),
        ("a.txt", b"\xff\xfe", "is not calibration text"),
        ("a.jsonl", b"import os", "is not calibration text"),
        ("a.jsonl", b'{"words": "import os"}', "is not calibration text"),
        ("a.jsonl", b'{"text": ["import os"]}', "is not calibration text"),
        ("a.jsonl", b'["text"]', "is not calibration text"),
    ],
)
def test_texts_that_are_refused(name: str, content: bytes, says: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(H1ExportError, match=says):
        Calibration(tmp_path / name, 2, 20).ids(tiny)


def test_a_file_that_is_not_there(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(H1ExportError, match="cannot be read"):
        Calibration(tmp_path / "a.txt").ids(tiny)


@pytest.mark.ort
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "no tokenizer.json, and calibration needs one; use --method rtn"),
        (["--method", "rtn", "--calibration", "a.txt"], "--calibration: rtn looks at no text"),
        (["--quant", "none", "--method", "gptq"], "--method: gptq has nothing to do with --quant none"),
    ],
)
def test_contradictions_leave_nothing(
    options: list[str], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    checkpoint = request.getfixturevalue("make_checkpoint")()
    for command in ("build", "plan"):
        assert run([command, str(checkpoint), "--target", "ort", *options, "--out", str(tmp_path / "out")]) == 2
        err = capfd.readouterr().err
        assert says in err
        assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.ort
def test_the_manifest_says_on_what_integers_were_chosen(spoken_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("import os\n" * 400, encoding="utf-8")
    words = [str(spoken_checkpoint), "--target", "ort", "--quiet", "--calibration", str(text)]
    few = ["--calibration-samples", "2", "--calibration-length", "100", "--calibration-seed", "5"]
    assert run(["build", *words, *few, "--out", str(tmp_path / "out")]) == 0
    scheme = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))["scheme"]
    ids = scheme["calibration"].pop("ids")
    guard = scheme["calibration"]["guard"]
    assert all(found["solved"] > found["plain"] >= 0 for found in guard["plain"].values())
    assert scheme == {
        "quant": "int4",
        "group_size": 32,
        "method": "gptq",
        "chosen": {},
        "calibration": {
            "samples": 2,
            "length": 100,
            "seed": 5,
            "device": ComputeDevice.of("cpu").name,
            "guard": {"sequences": 1, "plain": guard["plain"]},
        },
    }
    chosen = Calibration(text, 2, 100, seed=5)
    assert ids == chosen.described(chosen.ids(spoken_checkpoint))["ids"]
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", ["smooth", "", "RTN"])
def test_unknown_methods(method: str) -> None:
    with pytest.raises(H1ExportError, match=f"--method: {method!r} is unknown; one of rtn, search, awq, gptq"):
        QuantScheme("int4", 32, method)  # type: ignore[arg-type]
