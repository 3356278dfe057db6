"""Whether the model has a row of its embedding for every token that a tokenizer can give."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from h1export.checkpoint.tokenizer import TOKENIZER, Tokenizer, load_tokenizer
from h1export.errors import H1ExportError
from h1export.model.config_reader import shown
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Ids

CHARACTERS = 8  # of a part of a prompt, for each token of the context
SLACK = 2  # a part that is cut in a word may have a few tokens more than the whole has there
NEXT_STEP = "give the tokenizer that the model was trained with, or resize the model's embeddings to this one"


def tokens_without_rows(tokenizer: Tokenizer, vocab_size: int) -> dict[str, int]:
    """Return the tokens whose ids are beyond the ``vocab_size`` rows of the embedding, in the order of their ids."""
    found = {token: number for token, number in tokenizer.vocabulary().items() if number >= vocab_size}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def check_vocabulary(folder: Path, vocab_size: int) -> None:
    """Check the tokenizer of the checkpoint in ``folder``, if it has one, before hours of work.

    Raises:
        H1ExportError: the tokenizer cannot be read, or has ids that the model has no rows for.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        return
    found = tokens_without_rows(load_tokenizer(folder), vocab_size)
    if found:
        others = f", and so are {len(found) - 1} more" if len(found) > 1 else ""
        raise H1ExportError(path, _beyond(*next(iter(found.items())), vocab_size) + others, NEXT_STEP)


def prompt_ids(tokenizer: Tokenizer, text: str, config: FalconH1Config, *, add_special_tokens: bool) -> Ids:
    """Return the ids of a prompt, int64 [tokens].

    Raises:
        H1ExportError: the model has no row for one of them, or there are far more than its context has. A little more
            than that is for `generate` to find, which knows what else is in the context.
    """
    context = config.max_position_embeddings
    length = CHARACTERS * context
    while length < len(text):  # a part of the text tells that it is too long, where all of it would take minutes
        if len(tokenizer.encode(text[:length]).ids) > SLACK * context:
            what = f"has more than {SLACK * context} tokens, and the model's context is {context}"
            raise H1ExportError("prompt", what, "shorten it")
        length *= CHARACTERS
    ids = np.array(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids, np.int64)
    if len(ids) and ids.max() >= config.vocab_size:
        number = int(ids[ids >= config.vocab_size][0])
        what = _beyond(tokenizer.id_to_token(number), number, config.vocab_size)
        raise H1ExportError("prompt", what, NEXT_STEP)
    return ids


def _beyond(token: str | None, number: int, vocab_size: int) -> str:
    return f"token {shown(token)} is id {number}, beyond the model's vocabulary of 0 to {vocab_size - 1}"
