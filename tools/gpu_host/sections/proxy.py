"""Section g: train the quality proxy by tools/train_proxy.py, on the text that the bundle carries.

The states of the training stay in the work folder, so that the section can be started again after its time limit and
goes on; the checkpoint and the log with the loss are written to the work folder's proxy/.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import lzma
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import train_proxy
from proxy import corpus, publishing, training
from proxy.model import config
from transformers import AutoTokenizer

from gpu_host import bundle
from gpu_host.section import Figure, Host, Row

SEED = 0
BATCH, DRY_BATCH = 64, 2
STABLE, DECAY = 320.0, 80.0  # tokens a parameter
DRY_RATIO = 1e-4  # one step
DRY_CHARACTERS = 6000
SAVE_SECONDS = 60  # what a section that is killed at its limit may lose
LARGEST_BITS = 1.0  # a byte of the held-out windows; the training that made benchmarks/proxy ended at 0.95
TRAIN = "train.u16"


def run(host: Host) -> Iterator[Row]:
    """Yield the text's size, then the training's figures after each phase, then the checkpoint that was written."""
    work = host.work / "proxy"
    try:
        (dry_text if host.dry else unpack_text)(host, work / "text")
    except (FileNotFoundError, ValueError) as why:
        yield Row("text", False, detail=str(why))
        return
    text = publishing.record_of(work)
    yield Row("text", True, {"tokens": text["train"]["tokens"], "held_out_tokens": text["heldout"]["tokens"]})
    lengths = (DRY_RATIO, DRY_RATIO) if host.dry else (STABLE, DECAY)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(training, "SAVE_SECONDS", SAVE_SECONDS))
        if host.dry:
            stack.enter_context(mock.patch.object(training, "EVAL_WINDOWS", 1))
        for verb, ratio in zip(("train", "decay"), lengths, strict=True):
            with (work / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
                train_proxy.run_phase(phase(host, work, verb, ratio=ratio))
            state = work / (train_proxy.STABLE if verb == "train" else decayed(ratio))
            figures = measured(host, work, state)
            bits = float(figures["held_out_bits_per_byte"] or math.inf)
            passed = math.isfinite(bits) and (host.dry or verb == "train" or bits <= LARGEST_BITS)
            yield Row("stable phase" if verb == "train" else "training", passed, figures)
    out = work / "checkpoint"
    publishing.publish(work, decayed(lengths[1]), out)
    yield Row("checkpoint", True, {"bytes": (out / "model.safetensors").stat().st_size})


def phase(host: Host, work: Path, verb: str, *, ratio: float) -> argparse.Namespace:
    """Return the arguments of tools/train_proxy.py for a phase; the decay starts where the stable phase stopped."""
    return argparse.Namespace(
        verb=verb,
        work=work,
        seed=SEED,
        device=host.device,
        dtype="float32" if host.dry else "bfloat16",
        batch=DRY_BATCH if host.dry else BATCH,
        stop=ratio,
        keep=0,
        start=None,
        length=ratio,
    )


def decayed(ratio: float) -> str:
    """Return the name of the state that train_proxy.py writes for a decay from the last stable state."""
    return f"decay-last+{ratio:g}.pt"


def measured(host: Host, work: Path, state: Path) -> dict[str, Figure]:
    """Return the figures of a saved state."""
    text = publishing.record_of(work)["train"]["sha256"]
    trained = training.start(config(), seed=SEED, text=text, device=host.device)
    trained.load(state)
    widths = corpus.token_bytes(AutoTokenizer.from_pretrained(work / "text" / "tokenizer"))
    bits = training.held_out(trained, train_proxy.ids_of(work, "heldout"), widths, dtype=torch.float32)
    tokens = trained.done * training.SEQ
    return {
        "steps": trained.step,
        "tokens": tokens,
        "tokens_per_parameter": trained.ratio,
        "held_out_bits_per_byte": bits,
        "training_s": trained.seconds,
        "tokens_per_s": tokens / trained.seconds,
    }


def unpack_text(host: Host, folder: Path) -> None:
    """Copy the bundle's text to ``folder``, and decompress its tokens, once.

    Raises:
        FileNotFoundError: the bundle's group text was not joined.
        ValueError: the tokens are not those of the record.
    """
    source = host.bundle / bundle.TEXT
    if not (source / "text.json").is_file():
        raise FileNotFoundError(f"{source}: is not there; pack with --text WORK, and join the group text")
    record = json.loads((source / "text.json").read_text(encoding="utf-8"))
    if (folder / TRAIN).is_file():
        return
    shutil.copytree(source, folder, dirs_exist_ok=True)
    part = folder / f".{TRAIN}.part"
    with lzma.open(folder / f"{TRAIN}.xz") as packed, part.open("wb") as plain:
        shutil.copyfileobj(packed, plain, 1 << 20)
    with part.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != record["train"]["sha256"]:
            raise ValueError(f"{source}: its tokens are not those of text.json; pack it again")
    part.replace(folder / TRAIN)


def dry_text(host: Host, folder: Path) -> None:
    """Write a text of some thousand characters to ``folder``, from what the tree has beside the committed proxy."""
    proxy = Path(__file__).parents[3] / "benchmarks" / "proxy"
    tokenizer = AutoTokenizer.from_pretrained(proxy)
    text = (proxy / "heldout.txt").read_text(encoding="utf-8")[:DRY_CHARACTERS]
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.uint16)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "heldout.txt").write_text(text, encoding="utf-8")
    record = {"seed": SEED, "packages": {}, "held_out": {}, "bytes": len(text.encode())}
    for name in ("train", "heldout"):
        ids.tofile(folder / f"{name}.u16")
        record[name] = {"tokens": len(ids), "sha256": hashlib.sha256(ids.tobytes()).hexdigest()}
    (folder / "text.json").write_text(json.dumps(record), encoding="utf-8")
