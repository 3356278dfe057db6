"""The tokenizer in the file: llama.cpp gives the ids that the checkpoint's own tokenizer gives."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from chat_templates import TEMPLATES
from tokenizers import AddedToken, Regex, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.tokenizer import Tokenizer
from h1export.commands.build import build_artifact
from h1export.errors import H1ExportError
from h1export.quantize.scheme import QuantScheme
from h1export.targets.gguf import pre_types
from h1export.targets.gguf.llama import Model
from h1export.targets.gguf.options import GgufOptions
from h1export.targets.gguf.pre_types import FALCON_H1, PRE_TYPES, PreType, pre_type_of
from h1export.targets.gguf.read_back import GgufFile
from h1export.targets.gguf.vocabulary import VOCABULARY
from h1export.targets.gguf.writer import MODEL

TEXTS = (
    "Hello world, it's 2026: we've 12345 'words' in (é, 中文, Привет)...\n\n  def main(x=1):\r\n\treturn `x` -- $3.50!",
    "<|im_start|>user\nWE'LL SEE 007 <|im_end|>\n<|im_start|>assistant\n",
    "   \n \t  €9 😀 ก็ ٣٤ a_b-c <b>bold</b> 3.3..3 \n\n\n x",
    "",
)
SPECIAL = ("<|pad|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<|bos|>")
PAD, END, _, TURN_END, BOS = range(5)


def trained(kind: PreType, *, bos: bool = False) -> LibraryTokenizer:
    """Return a tokenizer of 400 tokens that splits as ``kind`` does."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in kind.patterns]
    tokenizer = LibraryTokenizer(models.BPE(ignore_merges=kind.ignore_merges))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS, "the words in the world 123 456 2026 it's we've"] * 4, trainer)
    tokenizer.add_tokens([AddedToken("<b>", normalized=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<|bos|> $A", special_tokens=[("<|bos|>", BOS)])
    return tokenizer


@pytest.fixture
def with_tokenizer(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[[LibraryTokenizer], Path]:
    """with_tokenizer(tokenizer) -> an instruct checkpoint that has it, with two tokens that end a text."""

    def make(tokenizer: LibraryTokenizer) -> Path:
        folder = Path(shutil.copytree(make_checkpoint(vocab_size=410), tmp_path / "checkpoint"))
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "chat_template.jinja").write_text(TEMPLATES["chatml"])
        ends = {"eos_token_id": [TURN_END, END], "pad_token_id": PAD, "bos_token_id": BOS}
        (folder / "generation_config.json").write_text(json.dumps(ends))
        return folder

    return make


def built(checkpoint: Path, out: Path, **chosen: Any) -> Artifact:
    return build_artifact(checkpoint, "gguf", out, scheme=QuantScheme("int8"), options=GgufOptions(**chosen))


@pytest.mark.parametrize("name", list(PRE_TYPES))
def test_llama_cpp_gives_the_same_ids(
    name: str, with_tokenizer: Callable[[LibraryTokenizer], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of the table, in llama.cpp's own words."""
    tokenizer = trained(PRE_TYPES[name])
    monkeypatch.setattr(pre_types, "PRE_TYPES", {name: PRE_TYPES[name]})  # so that no equal one is found before
    artifact = built(with_tokenizer(tokenizer), tmp_path / "out", vocabulary="whole")
    model = Model(artifact.folder / MODEL, vocab_only=True)
    for text in TEXTS:
        assert model.tokenize(text) == tokenizer.encode(text).ids, repr(text)
    assert model.ends(TURN_END)
    assert model.ends(END)
    assert not model.ends(PAD)


@pytest.mark.parametrize("bos", [False, True])
def test_keys_of_the_tokenizer(bos: bool, with_tokenizer: Callable[[LibraryTokenizer], Path], tmp_path: Path) -> None:
    tokenizer = trained(PRE_TYPES[FALCON_H1], bos=bos)
    artifact = built(with_tokenizer(tokenizer), tmp_path / "out")
    fields = gguf.GGUFReader(artifact.folder / MODEL).fields
    found = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items()}
    data = json.loads(tokenizer.to_str())
    assert (found["model"], found["pre"]) == ("gpt2", FALCON_H1)
    assert found["merges"] == [" ".join(pair) for pair in data["model"]["merges"]]
    assert found["tokens"][:5] == list(SPECIAL)
    size = tokenizer.get_vocab_size()
    assert found["tokens"][size - 1] == "<b>"
    assert found["tokens"][size:] == [f"[PAD{row}]" for row in range(size, 410)]
    kinds = gguf.TokenType
    rest = [kinds.USER_DEFINED] + [kinds.UNUSED] * (410 - size)
    assert found["token_type"] == [kinds.CONTROL] * 5 + [kinds.NORMAL] * (size - 6) + rest
    assert (found["eos_token_id"], found["eot_token_id"]) == (TURN_END, END)
    assert (found["padding_token_id"], found["bos_token_id"]) == (PAD, BOS)
    assert (found["add_bos_token"], found["add_eos_token"]) == (bos, False)
    assert fields["tokenizer.chat_template"].contents() == TEMPLATES["chatml"]
    GgufFile(artifact.folder / MODEL).write_float32(tmp_path / "float32.gguf")
    for path in (artifact.folder / MODEL, tmp_path / "float32.gguf"):
        assert Model(path, vocab_only=True).tokenize(TEXTS[0]) == tokenizer.encode(TEXTS[0]).ids
    assert artifact.manifest.requirements[VOCABULARY] == "whole"


@pytest.mark.parametrize("name", ["chatml", "thinking"])
def test_the_modelfile(name: str, with_tokenizer: Callable[[LibraryTokenizer], Path], tmp_path: Path) -> None:
    checkpoint = with_tokenizer(trained(PRE_TYPES[FALCON_H1]))
    (checkpoint / "chat_template.jinja").write_text(TEMPLATES[name])
    artifact = built(checkpoint, tmp_path / "out")
    text = (artifact.folder / "Modelfile").read_text()
    first, *stops = text.splitlines()[:3]
    assert first == "FROM ./model.gguf"
    assert stops == ['PARAMETER stop "<|im_end|>"', 'PARAMETER stop "<|end_of_text|>"']
    assert '{{ "<|im_start|>user\\n" }}{{ .Content }}{{ "<|im_end|>\\n" }}' in text
    assert '{{ "<|im_start|>assistant\\n" }}"""' in text
    assert text.count('"""') == 2


@pytest.mark.parametrize("name", ["headers", "no_system", "blocks"])
def test_a_template_that_is_no_chain_of_messages_is_left_to_ollama(
    name: str, with_tokenizer: Callable[[LibraryTokenizer], Path], tmp_path: Path
) -> None:
    checkpoint = with_tokenizer(trained(PRE_TYPES[FALCON_H1]))
    (checkpoint / "chat_template.jinja").write_text(TEMPLATES[name])
    artifact = built(checkpoint, tmp_path / "out")
    assert "TEMPLATE" not in (artifact.folder / "Modelfile").read_text()


def test_a_published_tokenizer_is_known_by_its_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's converter takes it for falcon-h1, whatever else it splits."""
    tokenizer = Tokenizer(Path("tokenizer.json"), trained(PreType((r"\w", r"\s{3}"))))
    assert pre_type_of(tokenizer) is None
    ids = tokenizer.encode(pre_types.CONVERTERS_TEXT).ids
    monkeypatch.setattr(pre_types, "PUBLISHED", frozenset({hashlib.sha256(str(ids).encode()).hexdigest()}))
    assert pre_type_of(tokenizer) == FALCON_H1


def test_a_tokenizer_that_llama_cpp_cannot_have(tiny: Path, build: Callable[..., Artifact], tmp_path: Path) -> None:
    artifact = build(tiny, "int8", target="gguf")
    assert artifact.manifest.requirements[VOCABULARY].startswith("token ids only")
    assert "token ids alone" in (artifact.folder / "README.md").read_text()
    assert not (artifact.folder / "Modelfile").exists()
    fields = gguf.GGUFReader(artifact.folder / MODEL).fields
    assert fields["tokenizer.ggml.model"].contents() == "none"
    with pytest.raises(H1ExportError, match=r"--vocabulary whole.*--vocabulary ids"):
        built(tiny, tmp_path / "out", vocabulary="whole")
    assert not (tmp_path / "out").exists()


def test_ids_as_asked_for(with_tokenizer: Callable[[LibraryTokenizer], Path], tmp_path: Path) -> None:
    artifact = built(with_tokenizer(trained(PRE_TYPES[FALCON_H1])), tmp_path / "out", vocabulary="ids")
    assert Model(artifact.folder / MODEL).vocab_size == 410
    assert artifact.manifest.requirements[VOCABULARY] == "token ids only: as asked for: --vocabulary ids"
