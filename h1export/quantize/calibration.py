"""Calibration: the tokens on which a method observes the inputs of every projection."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from h1export.checkpoint.resolve import embedded_model
from h1export.checkpoint.text_file import read_text
from h1export.checkpoint.tokenizer import TOKENIZER, load_tokenizer
from h1export.errors import H1ExportError, reason
from h1export.model.falcon_h1.states import Ids
from h1export.quantize.choices import CPU

SHIPPED = "calibration.txt"  # a file in the embedded model's folder


@dataclass(frozen=True)
class Calibration:
    """The text for calibration, how much of it is used, and on which device.

    Attributes:
        file: .txt, or .jsonl with a "text" a line; None: the excerpt of CPython's library that ships with the embedded
            model.
        samples: number of sequences, which are taken at random places of the text and do not overlap.
        length: tokens in a sequence.
        seed: the seed of the places.
        device: what runs the model and solves for integers: cpu, cuda, or cuda:N for one of several GPUs.
    """

    file: Path | None = None
    samples: int = 40
    length: int = 512
    seed: int = 0
    device: str = CPU

    def ids(self, checkpoint: Path) -> Ids:
        """Returns token ids [samples, length] by the checkpoint's tokenizer.

        Raises:
            H1ExportError: there is no tokenizer, the file is not text, or the text is too short.
        """
        if not (checkpoint / TOKENIZER).is_file():
            what = f"no {TOKENIZER}, and calibration needs one"
            raise H1ExportError(checkpoint, what, "use --method rtn, or put the tokenizer into the checkpoint's folder")
        file = self.file or embedded_model() / SHIPPED
        tokenizer = load_tokenizer(checkpoint)
        tokens = np.concatenate(
            [tokenizer.encode(text, add_special_tokens=False).ids for text in _texts(file)] or [[]]
        ).astype(np.int64)
        places = len(tokens) // self.length
        if places < self.samples:
            enough = f"enough for {places} samples of {self.length}"
            what = f"has {len(tokens)} tokens, {enough}, and {self.samples} are requested"
            raise H1ExportError(file, what, "give a longer text by --calibration, or fewer --calibration-samples")
        chosen = np.random.default_rng(self.seed).permutation(places)[: self.samples]
        return np.stack([tokens[place * self.length : (place + 1) * self.length] for place in sorted(chosen)])

    def described(self, ids: Ids, device: str = CPU) -> dict[str, Any]:
        """Returns the settings for the manifest: the sha256 of the ids in place of the file, ``device`` by its name."""
        digest = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
        return {"ids": digest, "samples": self.samples, "length": self.length, "seed": self.seed, "device": device}


def _texts(file: Path) -> list[str]:
    try:
        text = read_text(file, "--calibration", kind="calibration text")
        return [_text_of(line) for line in text.splitlines() if line.strip()] if file.suffix == ".jsonl" else [text]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise H1ExportError(
            file, f"is not calibration text ({reason(error)})", 'give UTF-8 text, or .jsonl lines with a "text"'
        ) from None


def _text_of(line: str) -> str:
    text = json.loads(line)["text"]
    if not isinstance(text, str):
        raise TypeError('"text" is not a text')
    return text
