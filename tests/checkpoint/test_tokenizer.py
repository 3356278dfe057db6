"""Text of tokens that arrive one by one: characters are whole, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd_files import ODD, bounded
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from h1export.checkpoint.tokenizer import load_tokenizer, plain_tokenizer, stream
from h1export.errors import H1ExportError

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
HALVES = st.lists(
    st.one_of(st.sampled_from([part.encode() for part in ("é", "日", "😀", "a", " ", "\n", "\ufffd")]), st.binary()),
    max_size=30,
).map(b"".join)


def byte_level() -> Tokenizer:
    """A token a byte, as of a byte-level tokenizer without merges."""
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(ALPHABET)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """A token a byte, as of sentencepiece: the decoder looks at whole runs of bytes, and drops a leading space."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "b": 257, "<unk>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


LEVEL = byte_level()
FALLBACK = byte_fallback()
ID_OF_BYTE = {byte: LEVEL.token_to_id(letter) for letter, byte in zip(ALPHABET, range(256), strict=True)}


@given(HALVES)
def test_a_stream_is_the_text_of_all_its_tokens(data: bytes) -> None:
    ids = [ID_OF_BYTE[byte] for byte in data]
    pieces = list(stream(LEVEL, ids))
    assert "".join(pieces) == LEVEL.decode(ids)
    assert all(pieces)


@given(st.text(max_size=60))
def test_a_character_is_given_whole_and_at_once(text: str) -> None:
    ids = LEVEL.encode(text).ids
    pieces = list(stream(LEVEL, ids))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert [len(piece) for piece in pieces] == [1] * len(text)


@given(st.lists(st.integers(0, 257), max_size=40))
def test_a_decoder_that_changes_its_mind_raises_nothing(ids: list[int]) -> None:
    text = "".join(stream(FALLBACK, ids))
    assert text.count("b") >= ids.count(257)


@given(st.text(alphabet="é日😀b", max_size=40))
def test_characters_of_bytes_are_joined(text: str) -> None:
    ids = [257 if char == "b" else byte for char in text for byte in (b"b" if char == "b" else char.encode())]
    assert "".join(stream(FALLBACK, ids)) == FALLBACK.decode(ids) == text


@pytest.mark.parametrize("text", ['{"s3cret": "s3cret"}', "s3cret", "[" * 20000, '"\xff', ""])
def test_a_file_that_is_no_tokenizer_is_one_line_without_its_content(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text, encoding="latin-1")
    with pytest.raises(H1ExportError, match="not a tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_tokenizer_is_neither_waited_for_nor_loaded(odd: str, tmp_path: Path) -> None:
    ODD[odd](tmp_path / "tokenizer.json")
    with bounded(), pytest.raises(H1ExportError):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"fast_tokenizer_files": ["tokenizer.1.0.json"]}', "names another tokenizer than tokenizer.json"),
        ('{"model_max_length": "long"}', "transformers cannot load the tokenizer"),
        ('{"decode": 3}', "transformers cannot load the tokenizer"),
        ('{"added_tokens_decoder": {"x": {}}}', "transformers cannot load the tokenizer"),
        ('{"tokenizer_file": "/etc/passwd", "vocab_file": "/etc/passwd", "gguf_file": "x"}', ""),
    ],
)
def test_the_tokenizer_of_transformers_is_the_same_one(config: str, said: str, tmp_path: Path) -> None:
    LEVEL.save(str(tmp_path / "tokenizer.json"))
    FALLBACK.save(str(tmp_path / "tokenizer.1.0.json"))
    (tmp_path / "tokenizer_config.json").write_text(config)
    if said:
        with pytest.raises(H1ExportError, match=said):
            plain_tokenizer(tmp_path)
    else:
        assert plain_tokenizer(tmp_path).encode("é") == load_tokenizer(tmp_path).encode("é").ids
