"""Tokens that the model has no rows for are refused before a build, and by their names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as LibraryTokenizer

from h1export.checkpoint.tokenizer import Tokenizer, load_tokenizer
from h1export.checkpoint.vocabulary import check_vocabulary, prompt_ids, tokens_without_rows
from h1export.cli import run
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config

Edit = Callable[[LibraryTokenizer], Any]
EDITS: dict[str, tuple[Edit, int]] = {  # what is added to the 256 tokens, and how many ids are beyond 259
    "none": (lambda t: None, 0),
    "up to the last row": (lambda t: t.add_tokens(["a1", "a2", "a3"]), 0),
    "one": (lambda t: t.add_tokens(["a1", "a2", "a3", "[b]\x1b"]), 1),
    "special": (lambda t: t.add_special_tokens([AddedToken(f"<|{i}|>", special=True) for i in range(9)]), 6),
}


@pytest.fixture
def folder(spoken_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of 259 rows and 256 tokens that the test may change."""
    return Path(shutil.copytree(spoken_checkpoint, tmp_path / "checkpoint"))


def edited(folder: Path, edit: Edit) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    edit(tokenizer.library)
    tokenizer.library.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize("name", EDITS)
def test_every_id_beyond_the_rows_counts(name: str, folder: Path) -> None:
    edit, beyond = EDITS[name]
    tokenizer = edited(folder, edit)
    found = tokens_without_rows(tokenizer, 259)
    assert list(found.values()) == list(range(259, 259 + beyond))
    if not beyond:
        check_vocabulary(folder, 259)
        return
    with pytest.raises(H1ExportError) as caught:
        check_vocabulary(folder, 259)
    token = next(iter(found))
    assert f"token {token!r} is id 259, beyond the model's vocabulary of 0 to 258" in str(caught.value)
    assert ("so are" in str(caught.value)) == (beyond > 1)


def test_a_checkpoint_without_a_tokenizer_is_fine(tmp_path: Path) -> None:
    check_vocabulary(tmp_path, 1)


COMMANDS = [
    ["build", "--target", "ort", "--method", "rtn"],
    ["build", "--target", "ort", "--quant", "none"],
    ["plan", "--target", "coreml", "--method", "rtn"],
    ["plan", "--target", "trt", "--quant", "none"],
    ["sensitivity"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_commands_that_work_for_hours_refuse_at_once(
    words: list[str], folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edited(folder, EDITS["one"][0])
    monkeypatch.chdir(tmp_path)
    assert run([words[0], str(folder), *words[1:]]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert r"'[b]\x1b' is id 259" in err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_inspect_lists_them(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edited(folder, EDITS["special"][0])
    assert run(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["tokens_without_rows"] == {f"<|{i}|>": 256 + i for i in range(3, 9)}


def test_a_prompt_is_refused_by_its_first_token_without_a_row(folder: Path) -> None:
    tokenizer = edited(folder, EDITS["special"][0])
    config = FalconH1Config.load(folder)
    assert len(prompt_ids(tokenizer, "ab<|2|>", config, add_special_tokens=True)) == 3
    with pytest.raises(H1ExportError, match=r"'<\|4\|>' is id 260"):
        prompt_ids(tokenizer, "ab<|4|><|3|>", config, add_special_tokens=True)


def test_a_prompt_far_beyond_the_context_is_refused_before_all_of_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(folder)
    config = FalconH1Config.load(folder)
    monkeypatch.setattr("h1export.checkpoint.vocabulary.CHARACTERS", 3)
    context = config.max_position_embeddings
    with pytest.raises(H1ExportError, match="prompt: has more than"):
        prompt_ids(tokenizer, "a" * (4 * context), config, add_special_tokens=True)
    assert len(prompt_ids(tokenizer, "a" * (context + 1), config, add_special_tokens=True)) == context + 1
