"""The tokenizer of a checkpoint as the keys of the file, so that llama.cpp and Ollama need no other file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from h1export.checkpoint.chat_template import DEFAULT, ChatTemplate
from h1export.checkpoint.tokenizer import TOKENIZER, Tokenizer, load_tokenizer
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.special_tokens import SpecialTokens, special_tokens
from h1export.targets.gguf import sdk
from h1export.targets.gguf.options import Vocabulary
from h1export.targets.gguf.pre_types import pre_type_of

VOCABULARY = "vocabulary"  # the key of the manifest that says what the file has
NO_TOKENIZER = "the checkpoint has no tokenizer.json"
NO_PRE_TYPE = "llama.cpp has no way to split text as this tokenizer does"


@dataclass(frozen=True)
class WholeVocabulary:
    """A tokenizer that llama.cpp has.

    Attributes:
        tokenizer: the tokenizer.
        pre_type: the name of the way to split text.
        special: the tokens that begin, end and pad a text.
        templates: chat templates by name.
    """

    tokenizer: Tokenizer
    pre_type: str
    special: SpecialTokens
    templates: dict[str, str]

    def add_keys(self, writer: Any, vocab_size: int) -> None:
        """Add the tokenizer's keys to gguf's ``writer``."""
        data = json.loads(self.tokenizer.library.to_str())
        tokens, types = _tokens(data, vocab_size)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre_type)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in data["model"]["merges"]])
        self._add_special(writer)
        if self.templates:
            plain = self.templates.keys() == {DEFAULT}
            named = [{"name": name, "template": text} for name, text in sorted(self.templates.items())]
            writer.add_chat_template(self.templates[DEFAULT] if plain else named)

    def _add_special(self, writer: Any) -> None:
        """Add the special tokens: all that end a text, because llama.cpp stops at those alone that it knows."""
        plain = self.tokenizer.encode("a", add_special_tokens=False).ids
        full = self.tokenizer.encode("a").ids
        start = full.index(plain[0]) if plain and plain[0] in full else 0
        writer.add_add_bos_token(bool(start))
        writer.add_add_eos_token(len(full) > start + len(plain))
        bos = full[0] if start else self.special.bos
        if bos is not None:
            writer.add_bos_token_id(bos)
        ends = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
        for add, token in zip(ends, self.special.eos, strict=False):
            add(token)
        if self.special.pad is not None:
            writer.add_pad_token_id(self.special.pad)


@dataclass(frozen=True)
class IdsOnly:
    """A file that takes token ids alone; ``why`` says why it has no tokenizer."""

    why: str

    def add_keys(self, writer: Any, vocab_size: int) -> None:
        """Add the one key that says so."""
        writer.add_tokenizer_model("none")


def vocabulary_of(folder: Path, config: FalconH1Config, chosen: Vocabulary) -> WholeVocabulary | IdsOnly:
    """Return what the file has of the tokenizer in ``folder``.

    Raises:
        H1ExportError: ``chosen`` is "whole", and llama.cpp cannot have it, or the tokenizer cannot be read.
    """
    if chosen == "ids":
        return IdsOnly("as asked for: --vocabulary ids")
    if not (folder / TOKENIZER).is_file():
        why = NO_TOKENIZER
    else:
        tokenizer = load_tokenizer(folder)
        if (pre_type := pre_type_of(tokenizer)) is not None:
            templates = dict(ChatTemplate.read(folder).templates)
            return WholeVocabulary(tokenizer, pre_type, special_tokens(folder, config), templates=templates)
        why = NO_PRE_TYPE
    if chosen == "whole":
        raise H1ExportError("--vocabulary whole", why, "use --vocabulary ids: the file takes token ids alone then")
    return IdsOnly(why)


def _tokens(data: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Return the text and the type of every row of the embedding; rows without a token are unused."""
    kinds = sdk.gguf().TokenType
    tokens = [f"[PAD{row}]" for row in range(vocab_size)]
    types = [int(kinds.UNUSED)] * vocab_size
    for token, row in data["model"]["vocab"].items():
        tokens[row], types[row] = token, int(kinds.NORMAL)
    for added in data["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(kinds.CONTROL if added["special"] else kinds.USER_DEFINED)
    return tokens, types
