"""The proxy's text has nothing twice, and nothing of what is held out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from proxy import corpus
from transformers import AutoTokenizer

FUNCTION = "def {0}(value):\n" + "".join(f"    value = {{0}}_{i}(value) or None\n" for i in "abcdefgh")
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


def blocks(text: str) -> list[str]:
    return [block.strip() for block in text.split("\n\n\n") if len(block) >= corpus.MIN_BLOCK]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two packages and a held-out one, which copied from each other."""
    has = {"one": WORDS[:4], "two": WORDS[2:7], "kept_out": WORDS[5:]}
    for package, words in has.items():
        (tmp_path / package).mkdir()
        for i in range(0, len(words), 2):
            text = "\n\n\n".join(FUNCTION.format(word) for word in words[i : i + 2])
            (tmp_path / package / f"part{i}.py").write_text(text)
    (tmp_path / "one" / "table.py").write_text("ROWS = " + repr(list(range(400))))
    (tmp_path / "two" / "latin.py").write_bytes(b"# \xe9" * 200)
    monkeypatch.setattr(corpus, "PACKAGES", ("one", "two", "absent"))
    monkeypatch.setattr(corpus, "HELD_OUT_PACKAGES", ("kept_out",))
    monkeypatch.setattr(corpus, "STDLIB", "absent")
    monkeypatch.setattr(corpus, "version", lambda package: "1.0")
    monkeypatch.setattr(corpus, "files_of", lambda package: sorted((tmp_path / package).glob("*.py")))


@pytest.mark.usefixtures("packages")
def test_a_block_is_kept_once_and_never_where_it_is_held_out() -> None:
    train, held, sizes = corpus.gather(0)
    found = [block for text in train for block in blocks(text)]
    assert sorted(found) == sorted(FUNCTION.format(word).strip() for word in WORDS[:5])
    assert set(blocks("\n\n\n".join(held))).isdisjoint(found)
    assert {FUNCTION.format(word).strip() for word in WORDS[5:]} <= set(blocks("\n\n\n".join(held)))
    assert set(sizes) == {"one", "two"}
    assert corpus.gather(0) == (train, held, sizes)


@pytest.mark.usefixtures("packages")
def test_the_cache_has_every_token_and_its_record(tmp_path: Path) -> None:
    corpus.prepare(tmp_path / "text", 300, 0)
    tok = AutoTokenizer.from_pretrained(tmp_path / "text" / "tokenizer")
    ids = np.fromfile(tmp_path / "text" / "train.u16", np.uint16)
    train, _, sizes = corpus.gather(0)
    assert tok.decode(ids).split(tok.eos_token) == [*train, ""]
    record = json.loads((tmp_path / "text" / "text.json").read_text())
    assert record["train"]["tokens"] == len(ids)
    assert record["bytes"] == sum(sizes.values()) == corpus.token_bytes(tok)[ids].sum()


@pytest.mark.parametrize("text", ["", "a = 1\n", "é" * 300, "zwölf\tKühe 𝔘\n" * 40])
def test_widths_of_ids_are_bytes(tmp_path: Path, text: str) -> None:
    tok = corpus.make_tokenizer([FUNCTION.format(word) for word in WORDS], 300)
    ids = tok.encode(text, add_special_tokens=False)
    assert corpus.token_bytes(tok)[np.array(ids, int)].sum() == len(text.encode())
    assert corpus.token_bytes(tok)[tok.eos_token_id] == 0
