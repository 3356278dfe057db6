"""Write a trained proxy as a checkpoint folder that transformers loads, with its card."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_model import multipliers
from torch import Tensor
from train_tiny import bits_per_byte
from transformers import AutoTokenizer, FalconH1Config, FalconH1ForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from proxy import training
from proxy.corpus import MIN_BLOCK
from proxy.model import config, forward

SIZE_LIMIT = 12_000_000
HELD_OUT_BYTES = 120_000  # of the text that goes with the checkpoint
GAP = 1e-3  # largest difference of a float32 logit


def stored(cfg: FalconH1Config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights divided by their multipliers, which is exact but for rounding, with the tied head."""
    by = multipliers(cfg) | {"embed_tokens": 1.0}  # the tied table is trained as it is stored
    out = {name: p.detach().cpu() / by.get(name.split(".")[-2], 1.0) for name, p in weights.items()}
    return out | {"lm_head.weight": out["model.embed_tokens.weight"]}


@torch.no_grad()
def released(cfg: FalconH1Config, weights: dict[str, Tensor], probe: Tensor) -> FalconH1ForCausalLM:
    """Return the float32 transformers model of ``weights``, checked on the ids ``probe`` [B, T].

    Raises:
        SystemExit: transformers computes other logits than the forward pass that was trained.
    """
    model = FalconH1ForCausalLM(cfg).eval()
    model.load_state_dict(stored(cfg, weights))
    model.tie_weights()
    ours = forward(cfg, weights, probe, chunk=training.CHUNK, dtype=torch.float32)
    gap = (model(probe).logits - ours).abs().max().item()
    if not gap < GAP:
        raise SystemExit(f"train_proxy: transformers differs by {gap:.2e} in a logit; align proxy/model.py with it")
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[1, 3], pad_token_id=0, max_new_tokens=128)
    return model


CARD = """---
library_name: transformers
license: apache-2.0
tags: [falcon_h1]
---
# Proxy Falcon-H1

A Falcon-H1 of {parameters:,} parameters, trained on {ratio:.0f} tokens a parameter by `tools/train_proxy.py`, to judge
what few bits cost. Models that saw many tokens a parameter are hurt more by quantization than others
(arXiv:2411.04330); the embedded model saw fewer than one.

| figure | value |
|---|---|
| bits per byte on `heldout.txt` ({held_bytes:,} bytes), this bf16 checkpoint run in float32 | **{bpb:.4f}** |
| training | {steps:,} steps of {batch} x {seq} tokens, {tokens:,} tokens, {epochs:.2f} epochs, seed {seed} |
| rate | AdamW {peak:g}, constant, then linear to zero over the last {decay:.0%} of the tokens |
| time | {hours:.1f} hours of this process |
| training text | {text_tokens:,} tokens, {text_bytes:,} bytes, SHA-256 of the ids {sha} |

Bits per byte: nats / ln 2 / bytes, windows of 512 tokens half overlapped, each token scored once. `heldout.txt` is cut
from {held}, and from the modules of the standard library that the embedded model was not trained on either. No block of
{block} characters or more is both in it and in the training text.

The training text is the source and documentation of {packages}. It stays under the licences of its authors, which are
permissive; `heldout.txt` is under the MIT licence (anyio), the BSD licence (fsspec, jinja2) and the PSF License
Agreement (Python). The weights carry this project's licence.
"""


def record_of(work: Path) -> dict[str, Any]:
    """Return what ``prepare`` has written of the text of ``work``."""
    path = work / "text" / "text.json"
    if not path.is_file():
        raise SystemExit(f"train_proxy: {path}: not there; run `text` first")
    return json.loads(path.read_text())


def card_of(run: training.Run, record: dict[str, Any], **figures: float) -> str:
    """Return the card of a decayed run; ``record`` is text.json."""
    tokens = run.done * training.SEQ
    started = run.done if run.decay_from is None else run.decay_from
    return CARD.format(
        parameters=run.parameters,
        ratio=run.ratio,
        steps=run.step,
        batch=run.batch,
        seq=training.SEQ,
        tokens=tokens,
        epochs=tokens / record["train"]["tokens"],
        seed=run.seed,
        peak=training.PEAK,
        decay=1 - started / run.done,
        hours=run.seconds / 3600,
        text_tokens=record["train"]["tokens"],
        text_bytes=record["bytes"],
        sha=record["train"]["sha256"],
        block=MIN_BLOCK,
        held=", ".join(f"{name} {version}" for name, version in record["held_out"].items()),
        packages=", ".join(f"{name} {version}" for name, (version, _) in record["packages"].items()),
        **figures,
    )


def excerpt(text: str) -> str:
    """Return about HELD_OUT_BYTES of whole lines of the held-out text: its start, middle and end."""
    third = HELD_OUT_BYTES // 3
    parts = []
    for at in (0, len(text) // 2, len(text) - third):
        first = text.rfind("\n", 0, at) + 1
        parts.append(text[first : text.rfind("\n", first, first + third) + 1])
    return "".join(parts)


def publish(work: Path, state: str, out: Path) -> None:
    """Write the checkpoint of the file ``state`` of ``work`` to ``out``, its card and held-out text with it.

    Everything goes to a folder beside ``out`` first, is measured there, and is then moved file by file.

    Raises:
        SystemExit: the folder is larger than SIZE_LIMIT, or the weights do not compute what was trained.
    """
    record = record_of(work)
    cfg = config()
    run = training.start(cfg, seed=record["seed"], text=record["train"]["sha256"], device="cpu")
    run.load(work / state)
    ids = np.fromfile(work / "text" / "heldout.u16", np.uint16, training.SEQ).astype(np.int64)
    model = released(cfg, run.weights, torch.from_numpy(ids)[None]).bfloat16()
    tok = AutoTokenizer.from_pretrained(work / "text" / "tokenizer")
    text = excerpt((work / "text" / "heldout.txt").read_text())
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        folder = Path(name)
        bpb = write(folder, model, tok, text=text)
        card = card_of(run, record, bpb=bpb, held_bytes=len(text.encode()))
        (folder / "README.md").write_bytes(card.encode())
        size = sum(file.stat().st_size for file in folder.iterdir())
        if size > SIZE_LIMIT:
            raise SystemExit(f"train_proxy: {out}: {size} bytes is over {SIZE_LIMIT}; shrink config()")
        for file in folder.iterdir():
            file.chmod(0o644)
            os.replace(file, out / file.name)
    training.show(f"{out}: {run.ratio:.1f} tokens a parameter, {bpb:.4f} bits/byte, {size:,} bytes")


def write(folder: Path, model: FalconH1ForCausalLM, tok: PreTrainedTokenizerFast, *, text: str) -> float:
    """Write the model, tokenizer and held-out text; return the bits a byte of what transformers reads back."""
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    (folder / "heldout.txt").write_bytes(text.encode())
    again = FalconH1ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return bits_per_byte(again, AutoTokenizer.from_pretrained(folder), text)
