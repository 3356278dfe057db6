"""Text of tokens that arrive one by one: characters are whole, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd_files import ODD, bounded
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as LibraryTokenizer

from h1export.checkpoint.tokenizer import Tokenizer, load_tokenizer, plain_tokenizer, stream
from h1export.errors import H1ExportError

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
HALVES = st.lists(
    st.one_of(st.sampled_from([part.encode() for part in ("é", "日", "😀", "a", " ", "\n", "\ufffd")]), st.binary()),
    max_size=30,
).map(b"".join)


def byte_level() -> LibraryTokenizer:
    """A token a byte, as of a byte-level tokenizer without merges."""
    tokenizer = LibraryTokenizer(
        models.BPE(vocab={letter: number for number, letter in enumerate(ALPHABET)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> LibraryTokenizer:
    """A token a byte, as of sentencepiece: the decoder looks at whole runs of bytes, and drops a leading space."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "b": 257, "<unk>": 258}
    tokenizer = LibraryTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


LEVEL = Tokenizer(Path("byte level"), byte_level())
FALLBACK = Tokenizer(Path("byte fallback"), byte_fallback())
ID_OF_BYTE = {byte: LEVEL.library.token_to_id(letter) for letter, byte in zip(ALPHABET, range(256), strict=True)}


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
    LEVEL.library.save(str(tmp_path / "tokenizer.json"))
    FALLBACK.library.save(str(tmp_path / "tokenizer.1.0.json"))
    (tmp_path / "tokenizer_config.json").write_text(config)
    if said:
        with pytest.raises(H1ExportError, match=said):
            plain_tokenizer(tmp_path)
    else:
        assert plain_tokenizer(tmp_path).encode("é") == load_tokenizer(tmp_path).encode("é").ids


Edit = Callable[[LibraryTokenizer], None]


def part(name: str, step: object) -> Edit:
    """Return an edit that sets one part of a tokenizer."""
    return lambda tokenizer: setattr(tokenizer, name, step)


def unknown(tokenizer: LibraryTokenizer) -> None:
    """Take the tokens away that every text needs, and leave the unknown one out too."""
    tokenizer.model = models.WordLevel(vocab={"b": 0}, unk_token="[UNK]")


def saved(edit: Edit, folder: Path) -> Path:
    """Write the byte-level tokenizer with a change."""
    tokenizer = byte_level()
    edit(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    "edit",
    [
        part("normalizer", normalizers.Replace("", "x")),  # a panic of Rust
        part("pre_tokenizer", pre_tokenizers.Split(Regex("(x+x+)+y"), "isolated")),  # another
        unknown,  # an error of the library
    ],
)
def test_steps_that_fail_are_errors_of_the_file(edit: Edit, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(edit, tmp_path))
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_all([text])):
        with bounded(), pytest.raises(H1ExportError, match=r"tokenizer.json: cannot encode this text"):
            encode("x" * 40)


def test_a_panic_inside_transformers_is_one_line_too(tmp_path: Path) -> None:
    with pytest.raises(H1ExportError, match="transformers cannot load the tokenizer"):
        plain_tokenizer(saved(part("normalizer", normalizers.Replace("", "x")), tmp_path))


REPEATED = {
    "normalizer": normalizers.Sequence([normalizers.Replace("a", "aa")] * 11),
    "a normalizer in a normalizer": normalizers.Sequence(
        [normalizers.Sequence([normalizers.Replace(Regex("a|"), "a" * 32)])] * 3
    ),
    "prepend": normalizers.Prepend("a" * 1024),
    "steps": normalizers.Sequence([normalizers.NFC()] * 65),
}


@pytest.mark.parametrize("name", REPEATED)
def test_no_file_makes_a_text_far_longer(name: str, tmp_path: Path) -> None:
    with bounded(), pytest.raises(H1ExportError, match=r"normalizer and pre_tokenizer: (can make|has \d+ steps)"):
        load_tokenizer(saved(part("normalizer", REPEATED[name]), tmp_path))


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 6)),
        ("post_processor", processors.TemplateProcessing(single=" ".join(["$A"] * 1025), special_tokens=[])),
        ("decoder", decoders.Sequence([decoders.Replace("a", "b" * 64)] * 2)),
    ],
)
def test_every_part_is_measured(name: str, step: object, tmp_path: Path) -> None:
    with pytest.raises(H1ExportError, match="longer"):
        load_tokenizer(saved(part(name, step), tmp_path))


@pytest.mark.parametrize(
    "step",
    [
        normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
        normalizers.BertNormalizer(),
        normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]),
    ],
)
def test_steps_of_real_tokenizers_pass(step: normalizers.Normalizer, tmp_path: Path) -> None:
    load_tokenizer(saved(part("normalizer", step), tmp_path))
